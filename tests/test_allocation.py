import itertools

import pytest
import torch
from torch import Tensor

from deltacome.compression.allocation import (
    DISTORTION,
    Spectrum,
    allocate,
    spectra_of_tensors,
    spectra_tensors,
    spent_bits,
)
from deltacome.format.terms import component_bits


def error(spectrum: Spectrum, widths: Tensor) -> float:
    """Weighted error of a choice, component by component."""
    total = 0.0
    for k, b in enumerate(widths.tolist()):
        squares = 1.0 if spectrum.v_squares is None else float(spectrum.v_squares[k])
        noise = DISTORTION[b] / (1 - DISTORTION[b]) if b else 0.0
        share = noise + squares * noise + squares * noise**2 if b else spectrum.drop_weight
        total += spectrum.weight * float(spectrum.s[k]) ** 2 * share
    return total


@pytest.mark.parametrize("components", [5.0, 9.0, 21.0])
def test_allocation_is_near_the_best_of_all(components: float) -> None:
    s = torch.tensor([5.0, 2.0, 1.0, 0.5])
    spectrum = Spectrum((64, 96), s, drop_weight=8.0, v_squares=torch.tensor([1.0, 1.5, 0.7, 1.0]))
    budget = components * component_bits(1, 64, 96)
    widths = allocate([spectrum], budget)[0]
    assert spent_bits(spectrum, widths) <= budget
    choices = (torch.tensor(c) for c in itertools.product((0, *DISTORTION), repeat=4))
    best = min(error(spectrum, c) for c in choices if spent_bits(spectrum, c) <= budget)
    # Multipliers find what lies on the convex hull, and single steps go on from there.
    assert error(spectrum, widths) <= 1.15 * best


def test_the_budget_is_shared_out_by_error() -> None:
    torch.manual_seed(0)
    s = torch.rand(200).sort(descending=True).values
    sizes = ((1.0, 1.0), (1.0, 4.0), (2.0, 1.0), (0.0, 1.0))
    spectra = [Spectrum((200, 300), s * size, weight) for size, weight in sizes]
    budget = 60_000
    found = allocate(spectra, budget)
    spent = [spent_bits(spectrum, widths) for spectrum, widths in zip(spectra, found, strict=True)]
    assert 0.995 * budget < sum(spent) <= budget
    assert spent[0] < spent[1] and spent[3] == 0
    assert spent[1] == pytest.approx(spent[2], rel=0.1)  # four times the weight is twice the singular values


def test_more_budget_is_less_error_and_all_of_it_is_the_finest_code() -> None:
    spectrum = Spectrum((40, 50), torch.arange(40, 0, -1) / 10, drop_weight=3.0, fixed_bits=64)
    budgets = [0, 100, 200, 1000, 5000, 20_000, 10**7]
    errors = [error(spectrum, allocate([spectrum], budget)[0]) for budget in budgets]
    assert errors == sorted(errors, reverse=True)
    assert allocate([spectrum], 0)[0].sum() == 0 and spent_bits(spectrum, allocate([spectrum], 0)[0]) == 0
    assert set(allocate([spectrum], 10**7)[0].tolist()) == {max(DISTORTION)}


def test_a_spectrum_survives_a_file() -> None:
    spectrum = Spectrum((40, 50), torch.rand(40), 6.0, 2.5, fixed_bits=96)
    other, again = spectra_of_tensors(spectra_tensors([Spectrum((3, 4), torch.ones(2)), spectrum]))
    assert other.shape == (3, 4)
    assert torch.equal(again.s, spectrum.s)
    assert (again.shape, again.weight, again.drop_weight, again.fixed_bits) == ((40, 50), 6.0, 2.5, 96)
