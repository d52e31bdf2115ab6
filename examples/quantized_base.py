"""Measure what a base in 4 bit costs: deltas made on it and on the 16-bit base, and the fine-tune itself in 4 bit.

    python quantized_base.py BASE FINETUNED test.jsonl --ratio 16 -o output

Quantizes with bitsandbytes (NF4, on the CPU if need be), compresses against both bases, and compares everything with
the fine-tuned model, in float32 with the weights as they are dequantized. Table and picture are put into the output.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from deltacome import compress
from deltacome.benchmark.results import Table, save
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import read_examples
from deltacome.evaluate.comparison import COLUMNS, Comparison, load, sizes
from deltacome.evaluate.metrics import ANSWER_PATTERN, compile_pattern
from deltacome.evaluate.summary import import_pyplot
from deltacome.restore.merging import load_merged, open_checked


def quantize(source: Path, out: Path) -> Checkpoint:
    """A checkpoint in 4 bit, as bitsandbytes saves it."""
    if not out.exists():
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(out)
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return Checkpoint(out)


def in_float32(source: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The model of a checkpoint with other weights."""
    model, _ = load(Checkpoint(source))
    model.load_state_dict(weights, strict=False)
    return model


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read_float(name) for name in checkpoint.tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetuned", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--chat-template")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    bases = {"16": Checkpoint(arguments.base), "4": quantize(arguments.base, out / "base-4bit")}
    artifacts = {}
    for bits, base in bases.items():
        if not (out / f"delta-{bits}").exists():
            compress(base.folder, arguments.finetuned, out / f"delta-{bits}", ratio=arguments.ratio)
        artifacts[bits] = open_checked(base, out / f"delta-{bits}")
    comparison = Comparison(
        Checkpoint(arguments.finetuned),
        read_examples(arguments.data, arguments.limit),
        new_tokens=64,
        chat_template=arguments.chat_template,
        pattern=compile_pattern(ANSWER_PATTERN),
    )

    def quantized_finetuned() -> Any:
        return in_float32(arguments.finetuned, read_all(quantize(arguments.finetuned, out / "finetuned-4bit")))

    def beside_another_base() -> Any:
        model, _ = load_merged(bases["16"], artifacts["16"])
        ours, theirs, weights = read_all(bases["16"]), read_all(bases["4"]), model.state_dict()
        return in_float32(arguments.finetuned, {n: weights[n] + theirs[n] - ours[n] for n in ours if n in weights})

    rows = []
    for name, artifact, make in (
        ("base, 16 bit", None, lambda: load(bases["16"])[0]),
        ("base, 4 bit", None, lambda: in_float32(arguments.base, read_all(bases["4"]))),
        ("fine-tuned", None, lambda: comparison.reference),
        ("fine-tuned in 4 bit itself", None, quantized_finetuned),
        ("delta on the 16-bit base", artifacts["16"], lambda: load_merged(bases["16"], artifacts["16"])[0]),
        ("the same beside the 4-bit base", artifacts["16"], beside_another_base),
        ("delta made on the 4-bit base", artifacts["4"], lambda: load_merged(bases["4"], artifacts["4"])[0]),
    ):
        size = sizes(artifact) if artifact else {}
        rows.append({"name": name, **size, **comparison.measure(name, make(), comparison.tokenizer)})
    for row in rows:
        row |= comparison.retention(row, rows[0], rows[2])
    for row in rows:
        del row["outputs"]

    figure, panels = import_pyplot().subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axes, key, label in zip(panels, ("on_task_kl", "accuracy"), ("KL, nats a token", "accuracy"), strict=True):
        names, values, errors = ([row[one] for row in reversed(rows)] for one in ("name", key, f"{key}_error"))
        axes.errorbar(values, names, xerr=errors, fmt="o", capsize=3)
        axes.set(xlabel=f"{label}, with its standard error")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_xscale("log")  # which leaves out the fine-tuned model's zero
    panels[1].set_xlim(0, None)
    columns = {key: COLUMNS[key] for key in ("name", "artifact_ratio", "on_task_kl", "nll", "accuracy", "retention")}
    title = f"{arguments.finetuned.name}, 1/{arguments.ratio:g}, {len(comparison.tasks)} held-out examples"
    table = Table(title, columns, rows)
    save(out, "quantized-base", [table], figure)
    print(table.markdown())


if __name__ == "__main__":
    main()
