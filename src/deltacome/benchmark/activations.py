"""How much of what a fine-tune changes in its layers' outputs a compressed delta loses (Delta-CoMe, table 8)."""

import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.benchmark.results import Row, Table, save, set_ticks
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ModuleNames
from deltacome.checkpoints.rebuilding import rebuild_stored
from deltacome.compression.calibration import batch
from deltacome.data import Encoder, read_examples
from deltacome.errors import DeltacomeError
from deltacome.evaluate.comparison import load
from deltacome.evaluate.summary import import_pyplot
from deltacome.format.artifact import Artifact
from deltacome.outputs import new_folder
from deltacome.progress import bar
from deltacome.restore.merging import open_checked

PARTS = ("low", "middle", "high")  # thirds of the decoder layers
OUTLIERS = 0.01  # of a layer's outputs, the largest
COLUMNS = {
    "name": "delta",
    "artifact_ratio": "artifact ratio",
    **{f"{part}_{kind}": f"{part} layers, {kind}" for part in PARTS for kind in ("all", "outliers")},
}


def benchmark_activations(
    out: Path,
    base: str,
    finetuned: str,
    deltas: Mapping[str, str],
    data: Path,
    *,
    limit: int = 16,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Measure deltas on the inputs that the fine-tuned model's linear layers have; write a new folder.

    A figure is E|x (W - W')^T|^2 / E|x (W - W_base)^T|^2, W' being the rebuilt weight: 0 is no error, 1 is the base's.
    It is the mean over the linear layers of a third of the model, of all their outputs or of the 1 % largest ones.

    Args:
        data, limit, chat_template: as of `evaluate`; prompts and completions are read together.

    Raises:
        DeltacomeError: on bad input, or if the model has no numbered layers of `nn.Linear`.
    """
    pyplot = import_pyplot()
    with new_folder(out) as folder, torch.inference_mode(), ExitStack() as hooks:
        checkpoint = Checkpoint(base)
        artifacts = {name: open_checked(checkpoint, delta) for name, delta in deltas.items()}
        source = Checkpoint(finetuned)
        model, tokenizer = load(source)
        ids, mask = batch(read_examples(data, limit), Encoder(tokenizer, chat_template))
        layers = list(_layers(model, next(iter(artifacts.values()))))
        if not layers:
            raise DeltacomeError(f"{finetuned} has no numbered layers of nn.Linear to measure")
        depth = 1 + max(number for number, _, _ in layers)
        figures: dict[str, dict[str, list[float]]] = {name: {} for name in deltas}
        with bar("measuring", len(layers)) as advance:

            def measure(name: str, part: str, module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                x, y = arguments[0][mask], output[mask]
                effect = (x @ (module.weight - checkpoint.read_float(name)).T).square()
                large = y.abs() >= y.abs().flatten().kthvalue(round((1 - OUTLIERS) * y.numel())).values
                for key, artifact in artifacts.items():
                    rebuilt = rebuild_stored(name, artifact, checkpoint, torch.float32)
                    error = (x @ (module.weight - rebuilt).T).square()
                    for kind, own in (("all", slice(None)), ("outliers", large)):
                        if (whole := float(effect[own].sum())) > 0:
                            share = float(error[own].sum()) / whole
                            figures[key].setdefault(f"{part}_{kind}", []).append(share)
                advance(1)

            for number, name, module in layers:
                part = PARTS[number * len(PARTS) // depth]
                hooks.callback(module.register_forward_hook(partial(measure, name, part)).remove)
            model(input_ids=ids, attention_mask=mask.long())
        rows: list[Row] = [
            {
                "name": name,
                "artifact_ratio": round(artifacts[name].ratio, 2),
                **{key: round(statistics.mean(shares), 5) for key, shares in own.items()},
            }
            for name, own in figures.items()
        ]
        title = f"Share of the delta's effect on outputs that is lost, {int(mask.sum())} tokens of {data.name}"
        return save(folder, "activations", [Table(title, COLUMNS, rows)], _plot(rows, pyplot))


def _layers(model: Any, artifact: Artifact) -> Iterator[tuple[int, str, nn.Linear]]:
    """The number of the decoder layer, the weight's name in checkpoints and the module, for each linear layer."""
    names = ModuleNames(model)
    modules = dict(model.named_modules())
    for name in artifact.stored:
        if names.find_expert(name) is not None:
            continue
        module_name, _, parameter = names.find(name).rpartition(".")
        number = re.search(r"\.(\d+)\.", module_name)
        module = modules.get(module_name)
        if parameter == "weight" and number and isinstance(module, nn.Linear):
            yield int(number[1]), name, module


def _plot(rows: list[Row], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    keys = [key for key in COLUMNS if key.rpartition("_")[2] in ("all", "outliers")]
    for place, row in enumerate(rows):
        x = [column + (place - (len(rows) - 1) / 2) * 0.08 for column in range(len(keys))]
        label = f"{row['name']}, 1/{row['artifact_ratio']:.1f}"
        axes.plot(x, [row.get(key) for key in keys], "os^Dvp*"[place % 7], label=label)
    axes.set_xticks(range(len(keys)), [COLUMNS[key].replace(" layers, ", ",\n") for key in keys])
    axes.set(yscale="log", xlabel="layers, outputs", ylabel="share of the delta's effect that is lost")
    set_ticks(axes.yaxis)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure
