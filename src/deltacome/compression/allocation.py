"""Bits for singular vectors by a Lagrange multiplier, over the components of one matrix or of many."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.format.terms import component_bits

# Share of the variance that the mid-rise code with the best step leaves of a normal variable, by bit-width (Max, 1960).
DISTORTION = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.01154, 6: 0.00104, 8: 0.00008}
CHOICES = (0, *sorted(DISTORTION))
CLOSE = 1e-9  # two multipliers, in proportion; what lies between them is left to the single steps


@dataclass(frozen=True)
class Spectrum:
    """What allocation needs to know of a matrix (m, n).

    s: its singular values in the metric that its error is measured in, (rank,). weight: what a unit of its squared
    error costs, against other matrices. drop_weight: what the error of a dropped component costs, against that of a
    coded one. v_squares: |v_k|² in the metric, (rank,); None if all are 1. fixed_bits: spent whatever is chosen.
    """

    shape: tuple[int, int]
    s: Tensor
    weight: float = 1.0
    drop_weight: float = 1.0
    v_squares: Tensor | None = None
    fixed_bits: int = 0


def spectra_tensors(spectra: list[Spectrum]) -> dict[str, Tensor]:
    """Spectra as tensors, to be kept in a file; `v_squares` is left out."""
    found = {}
    for number, spectrum in enumerate(spectra):
        figures = [*spectrum.shape, spectrum.fixed_bits, spectrum.weight, spectrum.drop_weight]
        found[f"s{number}"] = spectrum.s
        found[f"figures{number}"] = torch.tensor(figures, dtype=torch.float64)
    return found


def spectra_of_tensors(tensors: dict[str, Tensor]) -> list[Spectrum]:
    """The inverse of `spectra_tensors`."""
    found = []
    for number in range(len(tensors) // 2):
        m, n, fixed_bits, weight, drop_weight = tensors[f"figures{number}"].tolist()
        shape = int(m), int(n)
        found.append(Spectrum(shape, tensors[f"s{number}"], weight, drop_weight, fixed_bits=int(fixed_bits)))
    return found


def allocate(spectra: list[Spectrum], budget_bits: float) -> list[Tensor]:
    """Bit-widths with the least weighted error that the budget buys: for each spectrum int64 (rank,), 0 for dropped.

    Dropping component k costs drop_weight s_k². Codes of b bits, scaled to be unbiased, have noise of N = d / (1 - d)
    of a vector's energy, d being `DISTORTION[b]`: s_k² N (1 + |v_k|² (1 + N)) for U and V together.
    """
    errors, costs = [], []
    for spectrum in spectra:
        errors.append(_errors(spectrum))
        cost = [0, *(component_bits(b, *spectrum.shape) for b in CHOICES[1:])]
        costs.append(torch.tensor(cost, dtype=torch.float64).expand(len(spectrum.s), -1))
    budget_bits -= sum(spectrum.fixed_bits for spectrum in spectra)
    chosen = _choose(torch.cat(errors), torch.cat(costs), budget_bits)
    return list(torch.tensor(CHOICES)[chosen].split([len(spectrum.s) for spectrum in spectra]))


def _errors(spectrum: Spectrum) -> Tensor:
    """What each component's error costs with each of the `CHOICES`, (rank, choices)."""
    noise = torch.tensor([DISTORTION[b] / (1 - DISTORTION[b]) for b in CHOICES[1:]], dtype=torch.float64)
    energy = spectrum.weight * spectrum.s.double().cpu().square()[:, None]
    squares = torch.ones_like(energy) if spectrum.v_squares is None else spectrum.v_squares.double().cpu()[:, None]
    return torch.cat((spectrum.drop_weight * energy, energy * noise * (1 + squares * (1 + noise))), dim=1)


def expected_error(spectrum: Spectrum, widths: Tensor) -> float:
    """The weighted error of a matrix with these bit-widths of its components."""
    return float(_errors(spectrum).gather(1, torch.searchsorted(torch.tensor(CHOICES), widths)[:, None]).sum())


def spent_bits(spectrum: Spectrum, widths: Tensor) -> int:
    """What a matrix takes with these bit-widths of its components."""
    counts = torch.bincount(widths).tolist()
    used = sum(count * component_bits(b, *spectrum.shape) for b, count in enumerate(counts) if b and count)
    return used + spectrum.fixed_bits if used else 0


def _choose(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The choice (rows,) in each row with the least sum of errors whose costs stay within the budget."""
    low, high = 0.0, float((errors[:, :1] / costs[:, 1:]).max()) if len(errors) else 0.0
    chosen = torch.zeros(len(errors), dtype=torch.int64)  # all dropped, as at `high`
    while high - low > CLOSE * high:
        multiplier = (low + high) / 2
        found = (errors + multiplier * costs).argmin(1)
        if _taken(costs, found).sum() > budget:
            low = multiplier
        else:
            high, chosen = multiplier, found
    # The multiplier moves in steps; what it leaves over goes to the best single steps up that still fit.
    left = budget - float(_taken(costs, chosen).sum())
    while len(errors):
        gain = _taken(errors, chosen)[:, None] - errors
        extra = costs - _taken(costs, chosen)[:, None]
        rate = torch.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, 0.0)
        row, choice = divmod(int(rate.argmax()), errors.shape[1])
        if rate[row, choice] <= 0:
            break
        left -= float(extra[row, choice])
        chosen[row] = choice
    return chosen


def _taken(values: Tensor, chosen: Tensor) -> Tensor:
    return values.gather(1, chosen[:, None])[:, 0]
