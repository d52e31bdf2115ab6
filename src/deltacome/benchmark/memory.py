"""How much memory many fine-tunes take: one base with compressed deltas, or a merged model for each."""

import ctypes
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from deltacome.benchmark.random_model import random_model, random_tenant, shared_with_tenants
from deltacome.benchmark.results import Row, Table, save, set_ticks
from deltacome.compression.budget import check_ratio
from deltacome.device import choose_device
from deltacome.errors import DeltacomeError
from deltacome.evaluate.summary import import_pyplot
from deltacome.outputs import new_folder
from deltacome.progress import bar
from deltacome.runtime.model import load

COUNTS = (2, 5, 10, 20, 50)
CONTEXT = 64  # tokens that each row has read
SPARE = 1.15  # times the bytes of the next model that must be free for it to be loaded
COLUMNS = {
    "tenants": "tenants",
    "gigabytes": "base and deltas, GB",
    "peak_gigabytes": "at most in a step of them all, GB",
    "merged_gigabytes": "merged models, GB",
    "merged": "merged models are",
    "times": "merged / deltas",
}


def benchmark_memory(
    out: Path,
    *,
    base: str | None = None,
    deltas: Mapping[str, str] | None = None,
    shape: str | None = None,
    ratio: float = 16,
    counts: Sequence[int] = COUNTS,
    device: str | None = None,
) -> dict[str, Any]:
    """Load more and more tenants, a row each in one batch; write `memory.json`, `memory.md` and `memory.png`.

    Args:
        base, deltas: real ones; each delta is loaded as often as it takes, every time anew.
        shape, ratio: in place of these, random ones.
        counts: numbers of tenants.

    Returns:
        As `results.save`. Memory is the process's resident bytes on a CPU and what PyTorch has allocated on a GPU, less
        what it was before; merged models that do not fit are computed: so many times the first.

    Raises:
        DeltacomeError: if there is nothing to load, it is broken or does not fit, or the folder exists.
    """
    if (base is None) == (shape is None) or (base is not None and not deltas):
        raise DeltacomeError("give either a base with --delta, or a --shape")
    check_ratio(ratio)
    pyplot = import_pyplot()
    place = choose_device(device)
    with new_folder(out) as folder, torch.inference_mode():
        before = _used(place)
        shared: Any
        if base is not None:
            assert deltas is not None
            shared = load(base, device=place)
            names = islice(cycle(deltas), max(counts))
            tenants: Iterator[Any] = (shared.tenants.read(f"{i}", deltas[name]) for i, name in enumerate(names))
        else:
            assert shape is not None
            shared = shared_with_tenants(random_model(shape, None, place))
            tenants = (random_tenant(f"{i}", shared, ratio, i) for i in range(max(counts)))
        weights = list(shared.parameters())
        rows: list[Row] = []
        with bar("benchmark", max(counts)) as advance:
            for number, tenant in enumerate(tenants, 1):
                shared.tenants.put(tenant)
                if number in counts:
                    rows.append(_row(shared, number, place, before))
                advance(1)
        del tenants, tenant, shared
        measured = _merged(weights, max(counts), place)
        for row in rows:
            known = measured.get(row["tenants"])
            most = max(measured)
            merged = row["tenants"] * measured[most] / most if known is None else known
            row["merged_gigabytes"] = round(merged / 1e9, 3)
            row["merged"] = "computed" if known is None else "measured"
            row["times"] = round(merged / max(row.pop("bytes"), 1), 1)
        title = f"{shape}, random weights" if shape else f"{base}, with {', '.join(deltas or ())} in turn"
        return save(folder, "memory", [Table(title, COLUMNS, rows)], _plot(rows, pyplot), device=str(place))


def _row(shared: Any, count: int, place: torch.device, before: int) -> Row:
    """Memory with the tenants that are there, at rest and during a step."""
    at_rest = _used(place)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    names = list(shared.deltas)
    ids = torch.randint(0, shared.config.vocab_size, (count, CONTEXT), device=place)
    cache = shared(ids, use_cache=True, logits_to_keep=1).past_key_values  # whoever's keys and values
    shared(ids[:, :1], past_key_values=cache, use_cache=True, tenants=names)
    peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else psutil.Process().memory_info().rss
    return {
        "tenants": count,
        "bytes": at_rest - before,
        "gigabytes": round((at_rest - before) / 1e9, 3),
        "peak_gigabytes": round((max(peak, at_rest) - before) / 1e9, 3),
    }


def _merged(weights: list[Tensor], count: int, place: torch.device) -> dict[int, int]:
    """Bytes that copies of a model's weights take, for each number up to `count` that fits beside what is there."""
    before, measured = _used(place), {}
    copies: list[list[Tensor]] = []
    size = sum(tensor.nbytes for tensor in weights)
    while len(copies) < count and _free(place) > SPARE * size:
        copies.append([tensor.clone() for tensor in weights])
        measured[len(copies)] = _used(place) - before
    return measured or {1: size}


def _used(place: torch.device) -> int:
    gc.collect()
    if place.type != "cuda":
        with suppress(AttributeError):  # GNU's allocator alone has it
            ctypes.CDLL(None).malloc_trim(0)  # or what was freed would take in what comes next, unseen
        return psutil.Process().memory_info().rss
    torch.cuda.empty_cache()  # or what PyTorch keeps for itself would not count as free
    return torch.cuda.memory_allocated(place)


def _free(place: torch.device) -> int:
    return torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available


def _plot(rows: list[Row], pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    counts = [row["tenants"] for row in rows]
    axes.plot(counts, [row["merged_gigabytes"] for row in rows], "s--", color="C1", label="a merged model each")
    computed = [(row["tenants"], row["merged_gigabytes"]) for row in rows if row["merged"] == "computed"]
    if computed:
        style = {"color": "C1", "markerfacecolor": "white", "label": "computed"}
        axes.plot(*zip(*computed, strict=True), "s", **style)
    axes.plot(counts, [row["gigabytes"] for row in rows], "o-", color="C0", label="one base, compressed deltas")
    axes.plot(counts, [row["peak_gigabytes"] for row in rows], "^:", color="C2", label="the same, during a step")
    axes.set(xlabel="tenants", ylabel="memory, GB", yscale="log")
    set_ticks(axes.yaxis)
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
