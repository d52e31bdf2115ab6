"""`make gpu-check`: what only a GPU can show, in eight minutes at most, with a short table last and JSON beside it.

Each part runs by itself: one that fails, or that has no time left, is a line in the table and nothing worse.
"""

import gc
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltacome.benchmark.random_model import SHAPES, computed_in, random_delta, random_model
from deltacome.benchmark.results import Row, Table, save
from deltacome.benchmark.timing import captured, copy_bandwidth, measure
from deltacome.device import choose_device
from deltacome.progress import bar
from deltacome.runtime.kernels import kernels_for

SECONDS = 450.0
CASES = ((1, 1, 16), (4, 1, 16), (16, 1, 16), (50, 1, 16), (1, 8, 16), (16, 4, 16), (16, 1, 32))
BEYOND_CACHES = 256e6  # bytes of codes that are gone through in a run
MOST_COPIES = 16
ROUNDS = 5
STEP_COLUMNS = {
    "tenants": "tenants",
    "rows": "rows each",
    "ratio": "ratio",
    "delta_ms": "deltas, ms",
    "slots_ms": "in slots, ms",
    "floor_ms": "copying their bytes, ms",
    "share": "share of copy bandwidth",
    "base_ms": "base's products, ms",
    "over_base": "both / base",
}
PART_COLUMNS = {"part": "part", "seconds": "s", "figure": "figure"}


def gpu_check(out: Path, seconds: float = SECONDS) -> None:
    """Run all parts and write `gpu-check.json` and `gpu-check.md` to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    place = choose_device()
    shape = "7b" if place.type == "cuda" else "135m"
    end = time.monotonic() + seconds
    tables: dict[str, Table] = {}
    parts: list[tuple[str, float, Callable[[float, Path], tuple[str, Table | None]]]] = [
        ("kernels against float64", 100, lambda left, folder: _tests(left)),
        (f"deltas of a step of {shape}", 90, lambda left, folder: _steps(shape, place, left)),
        (f"whole steps of {shape}", 60, lambda left, folder: _whole(shape, place, folder)),
        ("compression of two layers of 7b", 60, lambda left, folder: _compress(folder, left)),
        ("the embedded server, 16 tenants", 30, lambda left, folder: _serve(folder)),
    ]
    rows: list[Row] = []
    for name, needed, part in parts:
        started = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        table = None
        if end - started < needed:
            figure = "no time left"
        else:
            try:
                with TemporaryDirectory(dir=out) as folder:
                    figure, table = part(end - started, Path(folder))
            except subprocess.TimeoutExpired as error:
                figure = f"not done after {error.timeout:.0f} s"
            except Exception as error:  # whatever it is, the other parts' figures are worth having
                traceback.print_exc()
                figure = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        gc.collect()
        rows.append({"part": name, "seconds": round(time.monotonic() - started, 1), "figure": figure})
        if table is not None:
            tables[name] = table
        summary = Table("Parts", PART_COLUMNS, rows)
        save(out, "gpu-check", [*tables.values(), summary], device=str(place))
    for table in (*tables.values(), summary):
        print(f"\n{table.title}\n\n{table.markdown()}")


def _tests(left: float) -> tuple[str, None]:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "tests/test_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, 200), check=False)
    print(done.stdout[-3000:], file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\d+ (passed|failed|error)", line)]
    return lines[-1] if lines else f"exit status {done.returncode}", None


def _steps(shape: str, place: torch.device, left: float) -> tuple[str, Table]:
    """The launches of the deltas alone, of a step through all layers, against copying and against the base."""
    end = time.monotonic() + left - 30
    settings = SHAPES[shape]
    layers = settings["num_hidden_layers"]
    hidden, wide = settings["hidden_size"], settings["intermediate_size"]
    inner = hidden // settings["num_attention_heads"] * settings["num_key_value_heads"]
    groups = [(hidden, (hidden, inner, inner)), (hidden, (hidden,)), (hidden, (wide, wide)), (wide, (hidden,))]
    copied = copy_bandwidth(place)
    kernels = kernels_for(place.type)
    weights = [torch.randn(sum(ms), n, device=place, dtype=computed_in(place)) for n, ms in groups for _ in range(4)]
    rows: list[Row] = []
    with bar("benchmark", len(CASES)) as advance, torch.inference_mode():
        for tenants, each, ratio in CASES:
            if time.monotonic() > end:
                break
            inputs = {n: torch.randn(tenants * each, n, device=place, dtype=computed_in(place)) for n, _ in groups}
            bytes_of_layer = tenants * sum(2 * n * sum(ms) / ratio for n, ms in groups)
            copies = max(1, min(MOST_COPIES, round(BEYOND_CACHES / bytes_of_layer)))
            works, read = [], 0
            of_rows = np.repeat(np.arange(tenants), each)
            slots = kernels.Slots(tenants, len(of_rows), place) if hasattr(kernels, "Slots") else None
            in_slots: list[tuple[Any, Tensor, Tensor]] = []
            for copy in range(copies):
                for n, ms in groups:
                    deltas, firsts = _random(n, ms, tenants, each, ratio, place, copy)
                    read += sum(tensor.nbytes for packed, _ in deltas for tensor in packed.tensors())
                    y = torch.zeros(tenants * each, sum(ms), device=place, dtype=computed_in(place))
                    works.append((kernels.Work(deltas, firsts), y, inputs[n]))
                    if slots is not None:
                        work = kernels.SlotWork(slots, firsts[: len(ms)], ms, n)
                        for i, (packed, _) in enumerate(deltas):
                            work.fill(i % len(ms), i // len(ms), [packed])
                        in_slots.append((work, y, inputs[n]))

            def run(works: list[tuple[Any, Tensor, Tensor]] = works) -> None:
                for work, y, x in works:
                    work.add(y, x)

            def base(inputs: dict[int, Tensor] = inputs) -> None:
                for weight in weights:
                    inputs[weight.shape[1]] @ weight.T

            ways = {"delta": captured(run, place), "base": captured(base, place)}
            if slots is not None:
                slots.set(of_rows)
                ways["slots"] = captured(partial(run, in_slots), place)
            seconds = {
                key: sorted(values)[ROUNDS // 2] for key, values in measure(ways, ROUNDS, lambda _: None).items()
            }
            delta, of_base = seconds["delta"] / copies * layers, seconds["base"] / 4 * layers
            floor = read / copies * layers / copied
            rows.append(
                {
                    "tenants": tenants,
                    "rows": each,
                    "ratio": f"1/{ratio}",
                    "delta_ms": round(1e3 * delta, 2),
                    "slots_ms": round(1e3 * seconds["slots"] / copies * layers, 2) if "slots" in seconds else None,
                    "floor_ms": round(1e3 * floor, 2),
                    "share": round(floor / delta, 3),
                    "base_ms": round(1e3 * of_base, 2),
                    "over_base": round((delta + of_base) / of_base, 2),
                }
            )
            del works, in_slots, ways, run
            gc.collect()
            advance(1)
    title = f"Deltas of a step of {shape}, {layers} layers; copying {copied / 1e9:.0f} GB/s, read and written together"
    return ", ".join(f"{row['tenants']} x {row['rows']}: {row['delta_ms']} ms" for row in rows[:4]), Table(
        title, STEP_COLUMNS, rows
    )


def _random(
    n: int, ms: Sequence[int], tenants: int, each: int, ratio: float, place: torch.device, seed: int
) -> tuple[list[Any], list[int]]:
    """Deltas of matrices that share an input, of all tenants, and their first outputs."""
    generator = torch.Generator(place).manual_seed(seed)
    rows = [torch.arange(i * each, (i + 1) * each, device=place) for i in range(tenants)]
    firsts = [sum(ms[:i]) for i in range(len(ms))]
    deltas = [(random_delta(m, n, ratio, "uv", generator), own) for own in rows for m in ms]
    return deltas, firsts * tenants


def _whole(shape: str, place: torch.device, folder: Path) -> tuple[str, Table | None]:
    from deltacome.benchmark.runtime import COLUMNS, benchmark_runtime

    counts = (1, 4, 16, 50) if place.type == "cuda" else (1, 4)
    found = benchmark_runtime(folder / "runtime", shape, counts=counts, rounds=3)["tables"][0]
    figure = ", ".join(f"{row['tenants']}: {row['over_base']} of the base's time" for row in found["rows"])
    return figure, Table(found["title"], COLUMNS, found["rows"])


def _compress(folder: Path, left: float) -> tuple[str, Table | None]:
    """In a process of its own, which can be stopped."""
    arguments = ["benchmark", "compress", "--shape", "7b", "--layers", "2", "--rounds", "1", "-o", str(folder / "c")]
    command = [sys.executable, "-m", "deltacome.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, 150), check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["nothing was said"])[-1], None
    table = Table(**json.loads(done.stdout)["tables"][0])
    return table.title, table


def _serve(folder: Path) -> tuple[str, None]:
    """A load on 16 tenants, all of them one delta under other names, of a small model of random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from deltacome.benchmark.load import plan
    from deltacome.benchmark.serve import figures_of, measure_server, serve_deltas
    from deltacome.compression.pipeline import compress

    model = random_model("135m", 8, torch.device("cpu"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: model.config.vocab_size]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    with torch.inference_mode():
        for name in ("base", "finetuned"):
            for parameter in model.parameters() if name == "finetuned" else ():
                if parameter.ndim == 2:
                    parameter += 1e-3 * torch.randn_like(parameter)
            model.save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
    compress(folder / "base", folder / "finetuned", folder / "delta", ratio=16, method="delta-come")
    names = [f"tenant{number}" for number in range(16)]
    planned = plan({name: [({"role": "user", "content": f"Hello from {name}"},)] for name in names}, 128, 64.0, 0.0, 0)
    deltas = {name: (folder / "delta").resolve() for name in names}
    answers, _ = measure_server(serve_deltas, (str(folder / "base"), deltas, None), planned, 32, True)
    figures = figures_of(answers)
    return (
        f"{figures['tokens_per_second']} tokens a second, first token {figures['first_median']} s (median), "
        f"{figures['failed']} failed"
    ), None


if __name__ == "__main__":
    gpu_check(Path(sys.argv[1]))
