"""Compare with what else there is on PyPI: bytes, time and KL of the same fine-tune, in one run.

    pip install mergekit deltatensors sparse-llm
    python peers.py BASE FINETUNED test.jsonl --chat-template chatml.jinja -o OUTPUT

mergekit's LoRA extraction at three ranks, deltatensors' int4 and one-bit strategies, sparse-llm's SVD at two ranks, and
deltacome at 1/8, 1/16 and 1/32. Everything that each writes is counted. A system that fails is a row that says so.
OUTPUT gets peers.json, peers.md and peers.png.
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import torch

import deltacome
from deltacome.benchmark.report import figure
from deltacome.benchmark.results import Row, Table, save
from deltacome.checkpoints.adapter import Adapted
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import read_examples
from deltacome.evaluate.comparison import Comparison, load
from deltacome.evaluate.metrics import ANSWER_PATTERN, compile_pattern

Weights = dict[str, torch.Tensor]


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]}")


def read(checkpoint: Checkpoint) -> Weights:
    return {name: checkpoint.read_float(name) for name in checkpoint.tensors}


def ours(ratio: float) -> Callable[[Path, Path, Path], Callable[[], Weights]]:
    def make(base: Path, finetuned: Path, out: Path) -> Callable[[], Weights]:
        deltacome.compress(base, finetuned, out / "delta", ratio=ratio)

        def rebuild() -> Weights:
            deltacome.merge(base, out / "delta", out.with_name(f"{out.name}-merged"), dtype=torch.float32)
            return read(Checkpoint(out.with_name(f"{out.name}-merged")))

        return rebuild

    return make


def mergekit(rank: int) -> Callable[[Path, Path, Path], Callable[[], Weights]]:
    def make(base: Path, finetuned: Path, out: Path) -> Callable[[], Weights]:
        run("mergekit-extract-lora", "--model", finetuned, "--base-model", base, "--out-path", out / "lora",
            "--max-rank", str(rank), "--embed-lora", "--skip-undecomposable", "--exclude-regex", "lm_head")  # fmt: skip
        return lambda: read(Adapted(Checkpoint(base), out / "lora"))

    return make


def deltatensors(strategy: str) -> Callable[[Path, Path, Path], Callable[[], Weights]]:
    def make(base: Path, finetuned: Path, out: Path) -> Callable[[], Weights]:
        import deltatensors as package

        package.save_delta_from_paths(str(out / "it.wdelta"), str(finetuned), str(base), strategy=strategy)
        found = package.load_delta_from_paths
        return lambda: {k: torch.as_tensor(v) for k, v in found(str(out / "it.wdelta"), str(base)).items()}

    return make


def sparse(rank: int) -> Callable[[Path, Path, Path], Callable[[], Weights]]:
    """By its functions: its program wants a GPU."""

    def make(base: Path, finetuned: Path, out: Path) -> Callable[[], Weights]:
        from core.delta import compress_delta_svd_full, reconstruct_from_svd_delta

        compress_delta_svd_full(str(base), str(finetuned), str(out), rank=rank)
        return lambda: reconstruct_from_svd_delta(str(base), str(out), device="cpu").state_dict()

    return make


SYSTEMS = {
    ("deltacome", "1/8"): ours(8),
    ("deltacome", "1/16"): ours(16),
    ("deltacome", "1/32"): ours(32),
    ("mergekit-extract-lora", "rank 16"): mergekit(16),
    ("mergekit-extract-lora", "rank 64"): mergekit(64),
    ("mergekit-extract-lora", "rank 128"): mergekit(128),
    ("deltatensors int4", "int4"): deltatensors("int4"),
    ("deltatensors one bit", "quantized"): deltatensors("quantized"),
    ("sparse-llm SVD", "rank 16"): sparse(16),
    ("sparse-llm SVD", "rank 64"): sparse(64),
}
PACKAGES = ("mergekit", "deltatensors", "sparse-llm")
COLUMNS = {
    "name": "system",
    "setting": "setting",
    "bytes": "bytes",
    "artifact_ratio": "ratio",
    "seconds": "seconds",
    "on_task_kl": "on-task KL",
    "off_task_kl": "off-task KL",
    "accuracy": "accuracy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetuned", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--offtask", type=Path)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--chat-template")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    base, finetuned, out = arguments.base.resolve(), arguments.finetuned.resolve(), arguments.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    whole = 2 * Checkpoint(finetuned).elements
    comparison = Comparison(
        Checkpoint(finetuned),
        read_examples(arguments.data, arguments.limit),
        read_examples(arguments.offtask) if arguments.offtask else (),
        new_tokens=64,
        chat_template=arguments.chat_template,
        pattern=compile_pattern(ANSWER_PATTERN),
    )
    installed = {package.name: package.version for package in distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    columns, rows = COLUMNS, list[Row]()
    for number, ((name, setting), make) in enumerate(SYSTEMS.items()):
        place = out / str(number)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(out / f"{number}-merged", ignore_errors=True)
        place.mkdir()
        row: Row = {"finetune": finetuned.name, "name": name, "setting": setting}
        start = time.perf_counter()
        try:
            rebuild = make(base, finetuned, place)
            row["seconds"] = round(time.perf_counter() - start)
            row["bytes"] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            row["artifact_ratio"] = whole / row["bytes"]
            model, _ = load(Checkpoint(base))  # what a system does not give stays the base's
            model.load_state_dict({key: value.float() for key, value in rebuild().items()}, strict=False)
            row |= comparison.measure(f"{name}, {setting}", model, comparison.tokenizer)
            del row["outputs"]
        except Exception as error:
            row["failed"] = f"{error}"[:150]
            columns = COLUMNS | {"failed": "failed"}
        rows.append(row)
        table = Table(f"{finetuned.name}, {len(comparison.tasks)} held-out examples; {versions}", columns, rows)
        save(out, "peers", [table], figure(rows) if any("on_task_kl" in row for row in rows) else None)
    print(table.markdown())


if __name__ == "__main__":
    main()
