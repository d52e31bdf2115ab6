"""How long the kernel takes for one square matrix, by its size and the number of tenants in the batch."""

import statistics
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from deltacome.benchmark.random_model import computed_in, random_delta
from deltacome.benchmark.results import Row, Table, save
from deltacome.benchmark.timing import Run, captured, copy_bandwidth, measure
from deltacome.compression.budget import check_ratio
from deltacome.evaluate.summary import import_pyplot
from deltacome.outputs import new_folder
from deltacome.progress import bar
from deltacome.runtime.kernels import kernels_for

SIZES = (1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16)
BEYOND_CACHES = 256e6  # bytes of weights that are gone through in a run, so that they come from memory
COLUMNS = {
    "size": "hidden size",
    "tenants": "tenants",
    "base_us": "base's product, µs",
    "kernel_us": "kernel, µs",
    "pytorch_us": "plain PyTorch, µs",
    "over_pytorch": "plain PyTorch / kernel",
    "gigabytes_per_second": "packed GB/s",
    "share": "share of copy bandwidth",
}
PLAIN_COPIES = 4  # of a batch that plain PyTorch goes through: it is slow, and what it unpacks fills caches by itself
PLAIN = 1  # tenants up to which it is measured on a CPU, where it is slower still


def benchmark_kernel(
    out: Path,
    *,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    ratio: float = 16,
    device: str | None = None,
    rounds: int = 9,
) -> dict[str, Any]:
    """Measure random deltas and write `kernel.json`, `kernel.md` and `kernel.png` to a new folder.

    A matrix is (size, size), each row of a batch another tenant's. Microseconds are medians of a matrix's.

    Raises:
        DeltacomeError: if the folder exists.
    """
    check_ratio(ratio)
    pyplot = import_pyplot()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with new_folder(out) as folder, torch.inference_mode():
        copied = copy_bandwidth(place)
        rows = []
        with bar("benchmark", len(sizes) * len(batches)) as advance:
            for size in sizes:
                for count in batches:
                    rows.append(_row(size, count, ratio, place, rounds, copied))
                    advance(1)
        title = f"Deltas of 1/{ratio:g}; copying {copied / 1e9:.1f} GB/s, read and written bytes together"
        return save(folder, "kernel", [Table(title, COLUMNS, rows)], _plot(rows, pyplot), device=str(place))


def _row(size: int, count: int, ratio: float, place: torch.device, rounds: int, copied: float) -> Row:
    kernels, reference = kernels_for(place.type), import_module("deltacome.runtime.kernels.reference")
    generator = torch.Generator(place).manual_seed(0)
    bytes_of_tenant = 2 * size * size / ratio
    copies = max(round(min(BEYOND_CACHES / (count * bytes_of_tenant), 256)), 1)
    weights = [torch.randn(size, size, device=place, dtype=computed_in(place)) for _ in range(min(copies, 16))]
    works: dict[str, list[Any]] = {"kernel": [], "pytorch": []}
    read = 0
    for _ in range(copies):
        deltas = []
        for row in range(count):
            packed = random_delta(size, size, ratio, "uv", generator)
            deltas.append((packed, torch.tensor([row], device=place)))
        read = sum(tensor.nbytes for packed, _ in deltas for tensor in packed.tensors())
        works["kernel"].append(kernels.Work(deltas))
        works["pytorch"].append(reference.Work(deltas))
    works["pytorch"] = works["pytorch"][: PLAIN_COPIES if place.type == "cuda" or count <= PLAIN else 0]
    x = torch.randn(count, size, device=place, dtype=computed_in(place))
    y = torch.zeros(count, size, device=place, dtype=computed_in(place))

    def run(works: list[Any]) -> Run:
        return captured(lambda: [work.add(y, x) for work in works], place)

    ways = {key: run(own) for key, own in works.items() if own}
    ways["base"] = captured(lambda: [x @ weight.T for weight in weights], place)
    seconds = {key: statistics.median(values) for key, values in measure(ways, rounds, lambda _: None).items()}
    each = {key: seconds[key] / len(works[key]) for key in works if key in seconds}
    plain = each.get("pytorch")
    return {
        "size": size,
        "tenants": count,
        "base_us": round(1e6 * seconds["base"] / len(weights), 1),
        "kernel_us": round(1e6 * each["kernel"], 1),
        "pytorch_us": round(1e6 * plain, 1) if plain else None,
        "over_pytorch": round(plain / each["kernel"], 1) if plain else None,
        "gigabytes_per_second": round(read / each["kernel"] / 1e9, 2),
        "share": round(read / each["kernel"] / copied, 3),
    }


def _plot(rows: list[Row], pyplot: Any) -> Any:
    """A panel a size: microseconds against tenants."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(3 * len(sizes) + 1, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    ways = {
        "pytorch_us": ("plain PyTorch", "C1s--"),
        "kernel_us": ("kernel", "C0o-"),
        "base_us": ("base's product", "C2^:"),
    }
    for size, axes in zip(sizes, panels[0], strict=True):
        own = [row for row in rows if row["size"] == size]
        for key, (label, style) in ways.items():
            points = [(row["tenants"], row[key]) for row in own if row[key] is not None]
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks([row["tenants"] for row in own])
        axes.set(xlabel="tenants, one row each", title=f"{size} x {size}")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("one matrix, µs")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
