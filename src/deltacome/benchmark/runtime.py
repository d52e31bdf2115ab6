"""How long a decoding step takes with many tenants in a batch, and how well each kernel uses the memory."""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.bits import words_per_row
from deltacome.errors import DeltacomeError
from deltacome.files import refuse_existing, write_atomically
from deltacome.progress import bar
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.kernels.packed import Packed, pack_terms
from deltacome.runtime.model import share
from deltacome.runtime.tenant import Change, Tenant
from deltacome.summary import import_pyplot
from deltacome.terms import Factored, Term

# Llama shapes. Of 7B one layer is enough: the others are like it, and its vocabulary is left out.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 256,
        "tie_word_embeddings": False,
    },
}
COUNTS = (1, 2, 4, 8, 16)
CONTEXT = 64  # tokens in the cache
MERGED_COPIES = 2  # that take turns for any number of merged models: more would find no other caches than two do
# The part of a matrix's components that the default method stores at each bit-width, at 1/16 on the testbed.
PLAN = {4: 0.02, 3: 0.07, 2: 0.40, 1: 0.51}
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
KERNEL_COLUMNS = {
    "matrix": "matrix",
    "shape": "shape",
    "tenants": "tenants",
    "microseconds": "µs",
    "gigabytes_per_second": "packed GB/s",
    "share": "share of copy bandwidth",
    "over_reference": "plain PyTorch / kernel",
}

Row = dict[str, Any]


def benchmark_runtime(
    out: Path, shape: str, *, ratio: float = 16, device: str | None = None, rounds: int = 9
) -> dict[str, Any]:
    """Measure random weights of a shape and write `runtime.json`, `runtime.md` and `runtime.png` to a new folder.

    Each variant is measured in every round, so that a slow spell of the machine meets them all; figures are medians.

    Returns:
        `machine`, `shape`, `ratio`, `copy_gigabytes_per_second`, `steps` and `kernels` (a list of rows each).

    Raises:
        DeltacomeError: if there is no such shape, or the folder exists.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape not in SHAPES:
        raise DeltacomeError(f"there is no shape {shape}; choose from {', '.join(SHAPES)}")
    refuse_existing(out)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(place, dtype).eval()
    merged = [plain, *(copy.deepcopy(plain) for _ in range(MERGED_COPIES - 1))]
    shared = copy.deepcopy(plain)
    share(shared, None)
    with bar("benchmark", 2 * len(COUNTS) * rounds) as advance, torch.inference_mode():
        steps, kernels = [], []
        copied = _copy_bandwidth(place)
        for count in COUNTS:
            for number in range(len(shared.deltas), count):
                shared._tenants.put(random_tenant(f"tenant{number}", shared, ratio, number))
            steps.append(_steps(shared, plain, merged, count, rounds, advance))
            kernels += _kernels(shared, count, copied, rounds, advance)
    machine = f"{_processor(place)}, {torch.get_num_threads()} threads" if place.type == "cpu" else _processor(place)
    results = {
        "machine": f"{machine}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}",
        "shape": shape,
        "ratio": ratio,
        "copy_gigabytes_per_second": round(copied / 1e9, 2),
        "steps": steps,
        "kernels": kernels,
    }
    out.mkdir()
    write_atomically(out / "runtime.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(out / "runtime.md", _markdown(results).encode())
    _plot(results, out / "runtime.png")
    return results


def random_tenant(name: str, model: Any, ratio: float, seed: int) -> Tenant:
    """A tenant with random codes for every matrix of a model, of the plan and size that a real one has."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    packed: dict[int, tuple[Packed, Tensor | None]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight
            if id(weight) not in packed:  # else it is tied
                packed[id(weight)] = _random_delta(weight, ratio, isinstance(module, nn.Embedding), generator)
            delta, vectors = packed[id(weight)]
            changes[module_name] = Change(delta, vectors=vectors if isinstance(module, nn.Embedding) else None)
    return Tenant(name, None, changes)


def _random_delta(
    weight: Tensor, ratio: float, is_embedding: bool, generator: torch.Generator
) -> tuple[Packed, Tensor | None]:
    m, n = weight.shape
    components = 16 * m * n / ratio / sum(bits * part for bits, part in PLAN.items()) / (m + n)
    terms: list[Term] = []
    for bits, part in PLAN.items():
        rank = max(round(components * part), 1)
        u, v = (
            torch.randint(-(2**31), 2**31, (rank, words_per_row(side, bits)), generator=generator).to(torch.int32)
            for side in (m, n)
        )
        scale = 1e-4 * torch.rand(rank, generator=generator)
        terms.append(Factored(bits, (m, n), u, v, scale.bfloat16(), None, "v" if is_embedding else "uv"))
    packed = pack_terms(terms, (m, n), weight.device)
    if not is_embedding:
        return packed, None
    vectors = [term.right_vectors() * term.scale.float()[:, None] for term in terms if isinstance(term, Factored)]
    return packed, torch.cat(vectors).to(weight.device)


def _steps(
    shared: Any, plain: Any, merged: list[Any], count: int, rounds: int, advance: Callable[[float], None]
) -> Row:
    """One decoding step of `count` rows in each of three ways."""
    names = list(shared.deltas)[:count]
    ways = {
        "base_ms": _step(plain, count),
        "tenants_ms": _step(shared, count, tenants=names),
    }
    turns = [_step(merged[number % len(merged)], 1) for number in range(count)]
    ways["turns_ms"] = lambda: [turn() for turn in turns]
    seconds = _measure(ways, rounds, advance)
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


def _step(model: Any, rows: int, **options: Any) -> Callable[[], Any]:
    """A function that decodes one token for each row, the cache being as before afterwards."""
    ids = torch.randint(0, model.config.vocab_size, (rows, CONTEXT), device=model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1, **options).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True, **options)
        cache.crop(CONTEXT)

    return step


def _kernels(shared: Any, count: int, copied: float, rounds: int, advance: Callable[[float], None]) -> list[Row]:
    """The kernel alone, for each kind of matrix: all layers in a row, so that codes come from memory, not a cache."""
    kernels, reference = kernels_for(shared.device.type), import_module("deltacome.runtime.kernels.reference")
    # On a CPU plain PyTorch is so slow with many tenants that one has to do.
    back_ends = [kernels, reference] if count == 1 or shared.device.type == "cuda" else [kernels]
    tenants = list(shared.deltas.values())[:count]
    kinds: dict[str, list[str]] = {}
    for name, module in shared.named_modules():
        if isinstance(module, nn.Linear):
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
    ways: dict[str, Callable[[], Any]] = {}
    bytes_read = {}
    for kind, names in kinds.items():
        for back_end in back_ends:
            works = []
            for name in names:
                deltas = [
                    (tenant.changes[name].packed, torch.tensor([row], device=shared.device))
                    for row, tenant in enumerate(tenants)
                ]
                works.append(back_end.Work(deltas))
                bytes_read[kind] = sum(tensor.nbytes for packed, _ in deltas for tensor in packed.tensors())
            m, n = shared.get_submodule(names[0]).weight.shape
            x = torch.randn(count, n, device=shared.device, dtype=shared.dtype)
            y = torch.zeros(count, m, device=shared.device, dtype=shared.dtype)

            def run(works: list[Any] = works, x: Tensor = x, y: Tensor = y) -> None:
                for work in works:
                    work.add(y, x)

            ways[f"{kind}:{back_end.__name__}"] = run
    seconds = _measure(ways, max(rounds // 3, 1), lambda _: None)
    advance(rounds)
    rows = []
    for kind, names in kinds.items():
        own = seconds[f"{kind}:{kernels.__name__}"]
        plain = seconds.get(f"{kind}:{reference.__name__}")
        each = statistics.median(own) / len(names)
        m, n = shared.get_submodule(names[0]).weight.shape
        rows.append(
            {
                "matrix": kind,
                "shape": f"{m} x {n}",
                "tenants": count,
                "microseconds": round(1e6 * each, 1),
                "gigabytes_per_second": round(bytes_read[kind] / each / 1e9, 2),
                "share": round(bytes_read[kind] / each / copied, 3),
                "over_reference": round(statistics.median(plain) / statistics.median(own), 1) if plain else None,
            }
        )
    return rows


def _measure(
    ways: dict[str, Callable[[], Any]], rounds: int, advance: Callable[[float], None]
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for number in range(rounds + 1):
        for key, run in ways.items():
            _synchronize()
            started = time.perf_counter()
            run()
            _synchronize()
            if number:
                seconds[key].append(time.perf_counter() - started)
        advance(bool(number))
    return seconds


def _copy_bandwidth(place: torch.device) -> float:
    """Bytes a second, read and written ones together, of a large copy."""
    source = torch.zeros(2**26, device=place)
    target = torch.empty_like(source)
    seconds = _measure({"copy": lambda: target.copy_(source)}, 7, lambda _: None)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def table(rows: list[Row], columns: dict[str, str]) -> list[list[str]]:
    """The rows as text, without a heading."""
    return [
        [f"{row[key]:,}" if isinstance(row[key], int | float) else row[key] or "" for key in columns] for row in rows
    ]


def _markdown(results: dict[str, Any]) -> str:
    text = f"{results['shape']}, deltas of 1/{results['ratio']:g}, {results['machine']}; "
    text += f"copying {results['copy_gigabytes_per_second']} GB/s, read and written bytes together\n"
    for rows, columns in ((results["steps"], COLUMNS), (results["kernels"], KERNEL_COLUMNS)):
        lines = [list(columns.values()), ["---"] * len(columns), *table(rows, columns)]
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def _plot(results: dict[str, Any], path: Path) -> None:
    pyplot = import_pyplot()
    rows = results["steps"]
    counts = [row["tenants"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    ways = {"turns_ms": ("merged models in turn", "s--"), "tenants_ms": ("tenants in one batch", "o-")}
    for key, (label, style) in {**ways, "base_ms": ("base alone, as many rows", "^:")}.items():
        axes.plot(counts, [row[key] for row in rows], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xticks(counts)
    axes.set(xlabel="tenants, one row each", ylabel="a decoding step of them all, ms", title=results["machine"])
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
