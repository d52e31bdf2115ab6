"""What each part of a delta costs: the KL of the exact fine-tuned model with that part alone from the artifact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.func import functional_call

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ModuleNames
from deltacome.checkpoints.rescaling import rescale
from deltacome.data import Encoded, read_examples
from deltacome.errors import DeltacomeError
from deltacome.evaluate.comparison import cut, load_for
from deltacome.evaluate.metrics import divergences
from deltacome.format.artifact import Artifact
from deltacome.progress import bar
from deltacome.restore.merging import load_merged, open_checked
from deltacome.weights import OUTPUT_EMBEDDINGS, is_embedding

# What is in the name of the module around a weight, by the part that it belongs to; the first that fits counts.
MARKS = {
    "vision": ("vision", "visual"),
    "experts": ("expert",),
    "attention": ("attn", "attention"),
    "MLP": ("mlp", "feed_forward", "ffn"),
}
COLUMNS = {
    "name": "model",
    "part": "part",
    "module": "module",
    "bytes": "bytes",
    "on_task_kl": "on-task KL",
    "off_task_kl": "off-task KL",
}


@dataclass
class Part:
    """A part of a delta: what it is called, its bytes in the artifact, and the model's parameters that it changes.

    module: the kind of module (`q_proj`), empty where the part has several.
    """

    part: str
    module: str
    bytes: int = 0
    parameters: set[str] = field(default_factory=set)


def evaluate_parts(
    base: str | Path,
    finetuned: str | Path,
    deltas: Mapping[str, str | Path],
    data: str | Path,
    *,
    offtask: str | Path | None = None,
    limit: int | None = None,
    chat_template: str | None = None,
) -> list[dict[str, Any]]:
    """Measure every delta part by part, in float32: that part as rebuilt, all else exactly the fine-tuned model's.

    Args:
        deltas: artifact folders by name.
        data, offtask, limit, chat_template: as of `deltacome.evaluate.comparison.evaluate`.

    Returns:
        For every delta, under its `name`, a row for all of it, a row a `part` and a row a kind of `module` in it, each
        with `bytes` in the artifact, `on_task_kl` and `off_task_kl` in nats a token, each with + `_error`. The
        row of what is stored exactly, the part `exact`, has bytes alone.

    Raises:
        DeltacomeError: on bad input, or if a delta's weights are no substitutes for the fine-tuned model's one by one.
    """
    examples = read_examples(data, limit)
    texts = read_examples(offtask) if offtask is not None else []
    base_checkpoint = Checkpoint(base)
    artifacts = {name: open_checked(base_checkpoint, path) for name, path in deltas.items()}
    for name, artifact in artifacts.items():
        if artifact.method.get("folded_norms"):
            raise DeltacomeError(
                f"{name} was compressed with --fold-norms, so its weights are right only together; leave out --by-part"
            )
    reference, encoder = load_for(examples, Checkpoint(finetuned), base_checkpoint, chat_template)
    encoded = {
        "on_task_kl": [cut(encoder.example(example)) for example in examples],
        "off_task_kl": [cut(encoder.example(text)) for text in texts],
    }
    rows = []
    for name, artifact in artifacts.items():
        merged, _ = load_merged(base_checkpoint, artifact)
        _check_same_shapes(name, reference, merged)
        factor = artifact.method.get("rescaled", 1.0)
        rescale(reference, factor)
        rows += _measure(name, parts_of(artifact, merged), reference, merged, encoded)
        rescale(reference, 1 / factor)
    return rows


def parts_of(artifact: Artifact, model: Any) -> list[Part]:
    """The parts of an artifact, by the parameters of the rebuilt model: all, each part, each kind of module, `exact`.

    A part that has one kind of module is there once. Bytes are tensors and metadata; those of `all` and of `exact`
    together are all of them.
    """
    names = ModuleNames(model)
    kinds: dict[tuple[str, str], Part] = {}
    exact = Part("exact", "")
    for entry in artifact.weights.values():  # the error may be a parent's
        if not (entry.factored or entry.sign or entry.error):
            exact.bytes += artifact.entries[entry.name].bytes
            continue
        slot = names.find_expert(entry.name)
        parameter = names.find(entry.name) if slot is None else slot.parameter
        key = _classify(parameter)
        kind = kinds.setdefault(key, Part(*key))
        kind.bytes += artifact.entries[entry.name].bytes
        kind.parameters.add(parameter)
    found = [_together("all", list(kinds.values()))]
    for part in dict.fromkeys(part for part, _ in kinds):
        members = [kind for kind in kinds.values() if kind.part == part]
        found += [_together(part, members), *members] if len(members) > 1 else members
    return [*found, exact]


def _classify(parameter: str) -> tuple[str, str]:
    """The part and the kind of module that a parameter belongs to."""
    around, _, kind = parameter.removesuffix(".weight").rpartition(".")
    if is_embedding(parameter):
        return "head" if parameter.endswith(OUTPUT_EMBEDDINGS) else "embeddings", kind
    return next((part for part, marks in MARKS.items() if any(mark in around for mark in marks)), "other"), kind


def _together(part: str, members: list[Part]) -> Part:
    parameters = {parameter for member in members for parameter in member.parameters}
    return Part(part, "", sum(member.bytes for member in members), parameters)


def _check_same_shapes(name: str, reference: Any, merged: Any) -> None:
    ours, theirs = ({key: p.shape for key, p in model.named_parameters()} for model in (merged, reference))
    if ours != theirs:
        differing = min(key for key, _ in ours.items() ^ theirs.items())
        raise DeltacomeError(
            f"{name} is not a delta of this fine-tuned model, or that is quantized: {differing} is not the same in both"
        )


def _measure(
    name: str, parts: list[Part], reference: Any, merged: Any, encoded: dict[str, list[Encoded]]
) -> list[dict[str, Any]]:
    rebuilt = dict(merged.named_parameters(remove_duplicate=False))
    rows: list[dict[str, Any]] = [
        {"name": name, "part": part.part, "module": part.module, "bytes": part.bytes} for part in parts
    ]
    changing = [(row, part) for row, part in zip(rows, parts, strict=True) if part.parameters]
    models = [partial(_call, reference, {key: rebuilt[key] for key in part.parameters}) for _, part in changing]
    with bar(f"evaluating the parts of {name}", sum(map(len, encoded.values()))) as advance:
        for figure, examples in encoded.items():
            if examples:
                for (row, _), (kl, _) in zip(changing, divergences(reference, models, examples, advance), strict=True):
                    row |= {figure: kl.value, f"{figure}_error": kl.error}
    return rows


def _call(model: Any, parameters: dict[str, Tensor], **inputs: Any) -> Any:
    """The model's output with some of its parameters, and what is tied to them, replaced for this call."""
    return functional_call(model, parameters, kwargs=inputs)
