"""`benchmark papers`: the ideas of other papers beside ours, on the zoo's linear weights, at equal bits a weight.

Each idea is built again from its paper, without data, and approximates a delta in memory. What it would take on a disk
is counted in full: codes, scales, and of what is sparse the places of the entries, at their entropy.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.benchmark import results
from deltacome.benchmark.zoo.members import MEMBERS
from deltacome.benchmark.zoo.trial import LIMIT, Trial, measured
from deltacome.compression.allocation import Spectrum, allocate, spent_bits
from deltacome.compression.methods import MatrixDelta
from deltacome.compression.methods.delta_come import DeltaCome
from deltacome.compression.methods.low_rank import LowRank
from deltacome.compression.methods.rate_distortion import RateDistortion
from deltacome.compression.quantizers import fit_scale, quantize_rows
from deltacome.compression.svd import leading_components
from deltacome.evaluate.summary import import_pyplot
from deltacome.files import disk_errors
from deltacome.format.terms import SCALE_BITS, add_terms
from deltacome.progress import bar

BITS = (1.0, 0.5, 0.25)  # a weight: ratios of 16, 32 and 64
ENTRY_BITS = 4  # of an entry that UltraDelta keeps, as in its paper
STEP = 0.25  # of the share that UltraDelta keeps: so much more where the variance is high
COLUMNS = {
    "member": "member",
    "method": "method",
    "bits": "bits a weight",
    "on_task_kl": "on-task KL",
    "off_task_kl": "off-task KL",
}

Deltas = Mapping[str, MatrixDelta]
Approximations = dict[str, Tensor]


def benchmark_papers(
    out: str | Path,
    members: Sequence[str] = tuple(MEMBERS),
    *,
    cache: str | Path | None = None,
    limit: int = LIMIT,
) -> results.Table:
    """Measure every method at every size on every member; embeddings, heads and norms are the fine-tuned model's.

    Args:
        out: folder for a file of rows a member, which a killed run goes on from, for the table and a picture.
        cache: as of `benchmark_zoo`. limit: as of `Trial`.

    Raises:
        DeltacomeError: on an unknown member, a missing package or a full disk.
    """
    pyplot = import_pyplot()
    out = Path(out)
    rows = measured(out, members, cache, limit, BITS, _rows)
    table = results.Table("KL by bits a linear weight", COLUMNS, rows)
    with disk_errors(f"write {out}"):
        results.save(out, "papers", [table], _plot(rows, pyplot), limit=limit)
    return table


def ours(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """The default method."""
    method = RateDistortion()
    parts = {name: method.decompose(delta) for name, delta in deltas.items()}  # a linear is one part
    spectra = [method.spectrum(deltas[name], part.block, part.s) for name, (part,) in parts.items()]
    widths = allocate(spectra, bits * _elements(deltas))
    budgets = dict(zip(parts, map(spent_bits, spectra, widths), strict=True))
    found = {
        name: add_terms(torch.zeros_like(delta.values), method.quantize(delta, parts[name], budgets[name]))
        for name, delta in deltas.items()
    }
    return found, sum(budgets.values()) / _elements(deltas)


def delta_come(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """Delta-CoMe (arXiv 2406.08903), triple precision, rounded to the nearest."""
    return _by_method(DeltaCome(), deltas, bits)


def low_rank(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """Truncated SVD in 16 bit."""
    return _by_method(LowRank(), deltas, bits)


def delta_mix(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """DeltaMix (arXiv 2506.11087): the bit-widths with the least error of each matrix, and U fitted to the codes of V.

    The integer program over the components of a matrix is solved by a Lagrange multiplier. Their GPTQ needs data; here
    codes are the nearest.
    """
    found = {}
    for name, delta in deltas.items():
        shape = delta.values.shape[0], delta.values.shape[1]
        budget = bits * delta.values.numel()
        _, s, v = leading_components(delta.values, min(shape))
        (widths,) = allocate([Spectrum(shape, s)], budget)
        kept = widths > 0
        if not kept.any():
            found[name] = torch.zeros_like(delta.values)
            continue
        width, v = widths[kept][:, None], v[kept]
        right = quantize_rows(v, width).values
        right *= fit_scale(right, v, "least-squares")[:, None]
        # The reconstruction target of U: least squares on what V has become.
        target = torch.linalg.lstsq(right.T.double(), delta.values.T.double()).solution.float()
        left = quantize_rows(target, width).values
        left *= fit_scale(left, target, "least-squares")[:, None]
        found[name] = left.T @ right
    return found, bits


def bitdelta(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """BitDelta (arXiv 2402.10193): signs and one scale a matrix."""
    found = {name: _signs(delta.values) * delta.values.abs().mean() for name, delta in deltas.items()}
    return found, 1 + SCALE_BITS * len(deltas) / _elements(deltas)


def per_axis(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """Signs with a scale a row or a column, whichever errs less (arXiv 2512.19720; scales untrained)."""
    found, scales = {}, 0
    for name, delta in deltas.items():
        d = delta.values
        candidates = [_signs(d) * d.abs().mean(dim, keepdim=True) for dim in (0, 1)]
        errors = [float((d - candidate).square().sum()) for candidate in candidates]
        axis = errors.index(min(errors))
        found[name] = candidates[axis]
        scales += d.shape[1 - axis]
    return found, 1 + SCALE_BITS * scales / _elements(deltas)


def sign_low_rank(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """D-QReLO (arXiv 2604.16940): signs with one scale a matrix, and what is left in 16-bit factors of low rank."""
    found: Approximations = {}
    for name, delta in deltas.items():
        d = delta.values
        coarse = _signs(d) * d.abs().mean()
        m, n = d.shape
        terms = LowRank().compress(MatrixDelta(d - coarse), (bits - 1) * m * n - SCALE_BITS)
        found[name] = add_terms(coarse, terms)
    return found, bits


def ultra_delta(deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    """UltraDelta (arXiv 2505.13563): 4-bit entries, most of them dropped at random, the rest scaled up.

    Matrices fall into three groups by their variance, and each value's entries are dropped in equal shares. The paper's
    global factor from the trace norm is left out: it would change the model's scale, where this one is unbiased.
    """
    variances = {name: float(delta.values.var()) for name, delta in deltas.items()}
    order = sorted(deltas, key=variances.__getitem__)
    shares = {name: 1 + STEP * (3 * place // len(order) - 1) for place, name in enumerate(order)}
    codes = {name: _rounded(delta.values) for name, delta in deltas.items()}
    used = {name: float((found != 0).float().mean()) for name, (found, _) in codes.items()}

    def spent(keep: float) -> float:
        stored = {name: min(1.0, keep * shares[name]) * used[name] for name in deltas}
        sizes = [
            deltas[name].values.numel() * (_entropy(x) + ENTRY_BITS * x) + SCALE_BITS for name, x in stored.items()
        ]
        return sum(sizes) / _elements(deltas)

    low, keep = 0.0, 0.5
    for _ in range(40):
        middle = (low + keep) / 2
        low, keep = (low, middle) if spent(middle) > bits else (middle, keep)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (own, step) in codes.items():
        density = min(1.0, keep * shares[name])
        mask = torch.zeros(own.numel(), dtype=torch.bool)
        for code in own.unique():
            places = (own.flatten() == code).nonzero()[:, 0]
            mask[places[torch.randperm(len(places), generator=generator)[: round(density * len(places))]]] = True
        found[name] = torch.where(mask.view_as(own), own * step / density, 0.0)
    return found, spent(keep)


Method = Callable[[Deltas, float], tuple[Approximations, float]]
METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "deltacome": (ours, (1.25, *BITS)),
    "Delta-CoMe": (delta_come, (1.25, *BITS)),
    "DeltaMix": (delta_mix, BITS),
    "low rank": (low_rank, BITS),
    "UltraDelta": (ultra_delta, BITS),
    "BitDelta": (bitdelta, (1.0,)),
    "per-axis signs": (per_axis, (1.0,)),
    "D-QReLO": (sign_low_rank, (1.25,)),
}


def _rows(trial: Trial) -> Iterator[results.Row]:
    wanted = [(title, method, size) for title, (method, sizes) in METHODS.items() for size in sizes]
    taken: list[float] = []

    def approximate(method: Method, size: float) -> Approximations:
        linears = {key: delta for key, delta in trial.at(16 / size) if not delta.is_embedding}
        found, bits = method(linears, size)
        taken.append(bits)
        return trial.weights(found)

    with bar(f"measuring methods on {trial.finetuned.folder.name}", len(wanted)) as advance:
        found = trial.measure(approximate(method, size) for _, method, size in wanted)
        for number, ((title, _, _), figures) in enumerate(zip(wanted, found, strict=True)):
            yield {"method": title, "bits": round(taken[number], 3), **figures}
            advance(1)


def _by_method(method: DeltaCome | LowRank, deltas: Deltas, bits: float) -> tuple[Approximations, float]:
    found = {
        name: add_terms(torch.zeros_like(delta.values), method.compress(delta, bits * delta.values.numel()))
        for name, delta in deltas.items()
    }
    return found, bits


def _signs(d: Tensor) -> Tensor:
    return torch.where(d >= 0, 1.0, -1.0)


def _elements(deltas: Deltas) -> int:
    return sum(delta.values.numel() for delta in deltas.values())


def _entropy(share: float) -> float:
    """Bits that it takes to say of an entry whether it is one of this share."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _rounded(d: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `ENTRY_BITS` bits, and their step."""
    step = 2 * d.abs().max() / (2**ENTRY_BITS - 1)
    return (d / step).round(), step


def _plot(rows: Sequence[results.Row], pyplot: Any) -> Any:
    """KL by bits a weight: geometric means over the members."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True)
    for axis, key, title in zip(axes, ("on_task_kl", "off_task_kl"), ("on the task", "off the task"), strict=True):
        for place, name in enumerate(METHODS):
            sizes: dict[float, list[float]] = {}
            for row in rows:
                if row["method"] == name:
                    sizes.setdefault(round(8 * row["bits"]) / 8, []).append(math.log(max(row[key], 1e-9)))
            points = sorted((bits, math.exp(sum(logs) / len(logs))) for bits, logs in sizes.items())
            axis.plot(*zip(*points, strict=True), marker="os^Dvp*P"[place], label=name)
        axis.set(xscale="log", yscale="log", xlabel="bits a linear weight", ylabel="KL, nats a token", title=title)
        axis.grid(alpha=0.3)
        results.set_ticks(axis.xaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
