"""How long a decoding step takes with many tenants in a batch."""

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltacome.benchmark.random_model import random_model, random_tenant, shared_with_tenants
from deltacome.benchmark.results import Row, Table, save
from deltacome.benchmark.timing import captured, measure
from deltacome.compression.budget import check_ratio
from deltacome.device import choose_device
from deltacome.evaluate.summary import import_pyplot
from deltacome.outputs import new_folder
from deltacome.progress import bar

COUNTS = (1, 2, 4, 8, 16)
CONTEXT = 64  # tokens in the cache
# Merged models that take turns for any number of them: where caches are far smaller than a model, one is like many.
MERGED_COPIES = 2
LARGE = 2e9  # bytes
COLUMNS = {
    "tenants": "tenants",
    "base_ms": "base, a batch of as many rows, ms",
    "tenants_ms": "tenants in one batch, ms",
    "turns_ms": "merged models in turn, ms",
    "over_base": "tenants / base",
    "speedup": "in turn / tenants",
    "megabytes": "MB of base and deltas",
    "merged_megabytes": "MB of merged models",
}


def benchmark_runtime(
    out: Path,
    shape: str,
    *,
    layers: int | None = None,
    ratio: float = 16,
    counts: Sequence[int] = COUNTS,
    device: str | None = None,
    rounds: int = 9,
) -> dict[str, Any]:
    """Measure random weights of a shape and write `runtime.json`, `runtime.md` and `runtime.png` to a new folder.

    layers: of the shape only so many, and next to no vocabulary. counts: numbers of tenants. Figures are medians; on a
    GPU every way is a CUDA graph.

    Raises:
        DeltacomeError: if there is no such shape, or the folder exists.
    """
    check_ratio(ratio)
    pyplot = import_pyplot()
    place = choose_device(device)
    with new_folder(out) as folder, torch.inference_mode():
        plain = random_model(shape, layers, place)
        size = sum(parameter.nbytes for parameter in plain.parameters())
        merged = [plain, *(copy.deepcopy(plain) for _ in range(0 if size > LARGE else MERGED_COPIES - 1))]
        shared = shared_with_tenants(plain)
        rows = []
        with bar("benchmark", len(counts) * rounds) as advance:
            for count in counts:
                for number in range(len(shared.deltas), count):
                    shared.tenants.put(random_tenant(f"tenant{number}", shared, ratio, number))
                rows.append(_steps(shared, plain, merged, count, rounds, advance))
        figure = _plot(rows, pyplot)
        table = Table(f"{shape}, {layers or 'all'} layers, deltas of 1/{ratio:g}", COLUMNS, rows)
        return save(folder, "runtime", [table], figure, device=str(place), dtype=str(plain.dtype))


def _steps(
    shared: Any, plain: Any, merged: list[Any], count: int, rounds: int, advance: Callable[[float], None]
) -> Row:
    """One decoding step of `count` rows in each of three ways."""
    names = list(shared.deltas)[:count]
    batch = shared.tenants.batch_of(names)  # held, as `generate` and the server do for many steps
    turns = [decoding_step(model, 1) for model in merged]
    ways = {"base_ms": decoding_step(plain, count), "tenants_ms": decoding_step(shared, count, tenants=batch)}
    ways["turns_ms"] = lambda: [turns[number % len(turns)]() for number in range(count)]
    seconds = measure(ways, rounds, advance)
    median = {key: statistics.median(values) for key, values in seconds.items()}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    base_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    delta_bytes = sum(shared.deltas[name].bytes for name in names)
    return {
        "tenants": count,
        **{key: round(1e3 * value, 2) for key, value in median.items()},
        "over_base": round(ratio("tenants_ms", "base_ms"), 2),
        "speedup": round(ratio("turns_ms", "tenants_ms"), 2),
        "megabytes": round((base_bytes + delta_bytes) / 1e6, 1),
        "merged_megabytes": round(count * base_bytes / 1e6, 1),
    }


def decoding_step(model: Any, rows: int, **options: Any) -> Callable[[], Any]:
    """A function that decodes one token for each row, the cache being as before afterwards."""
    ids = torch.randint(0, model.config.vocab_size, (rows, CONTEXT), device=model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values  # whoever's keys and values
    before = [(layer.keys, layer.values) for layer in cache.layers]  # where a CUDA graph finds them

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True, **options)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys, values

    return captured(step, model.device)


def _plot(rows: list[Row], pyplot: Any) -> Any:
    counts = [row["tenants"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    ways = {"turns_ms": ("merged models in turn", "C1s--"), "tenants_ms": ("tenants in one batch", "C0o-")}
    for key, (label, style) in {**ways, "base_ms": ("base alone, as many rows", "C2^:")}.items():
        axes.plot(counts, [row[key] for row in rows], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(counts)
    axes.set(xlabel="tenants, one row each", ylabel="a decoding step of them all, ms")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
