import pytest
import torch
from torch import Tensor

from conftest import term_bytes
from deltacome.compression.methods import MatrixDelta, make_method
from deltacome.format.terms import Factored, Term, add_terms
from test_methods import make_delta, rebuilt


def output_error(terms: list[Term], delta: Tensor, energy: Tensor) -> float:
    return float(((rebuilt(terms, delta) - delta).square() * energy).sum() / (delta.square() * energy).sum())


def outliers(n: int) -> Tensor:
    """Energies of inputs as they are: most alike, some a hundred times as large."""
    torch.manual_seed(1)
    energy = torch.rand(n) + 0.5
    energy[:: n // 5] = 100.0
    return energy


@pytest.mark.parametrize("bits_per_weight", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(("m", "n"), [(96, 130), (130, 96), (61, 61), (300, 40)])
def test_the_budget_is_spent_and_no_more(m: int, n: int, bits_per_weight: float) -> None:
    budget = bits_per_weight * m * n
    terms = make_method("rate-distortion").compress(MatrixDelta(make_delta(m, n), energy=outliers(n)), budget)
    assert 0.9 * budget < sum(8 * term_bytes(term) for term in terms) <= budget
    widths = [term.bits for term in terms if isinstance(term, Factored)]
    assert widths == sorted(set(widths), reverse=True)


@pytest.mark.parametrize("bits_per_weight", [0.5, 1.0])
def test_less_output_error_than_delta_come_and_no_less_of_the_delta(bits_per_weight: float) -> None:
    delta, energy = make_delta(300, 260), outliers(260)
    budget = bits_per_weight * delta.numel()
    ours = make_method("rate-distortion", restore=0.0).compress(MatrixDelta(delta, energy=energy), budget)
    theirs = make_method("delta-come").compress(MatrixDelta(delta), budget)
    assert output_error(ours, delta, energy) < 0.8 * output_error(theirs, delta, energy)
    default = make_method("rate-distortion").compress(
        MatrixDelta(delta, energy=energy, layers=30, bits_per_weight=0.25), budget
    )
    kept = [float((rebuilt(terms, delta) * delta).sum() / delta.square().sum()) for terms in (default, theirs)]
    assert kept[0] > kept[1]


def test_what_each_part_is_worth() -> None:
    """Without the rotation, or without feedback, the outputs are further off on inputs with outliers."""
    torch.manual_seed(0)
    n = 256
    energy = outliers(n)
    delta = make_delta(200, n) * (1 + 3 * (energy > 10))  # a fine-tune changes the columns of outliers most
    errors = {}
    for name, off in (("full", {}), ("rotate", {"rotate": False}), ("feedback", {"feedback": False})):
        terms = make_method("rate-distortion", **off).compress(MatrixDelta(delta, energy=energy), 0.7 * delta.numel())
        errors[name] = output_error(terms, delta, energy)
    assert errors["full"] < 0.97 * errors["feedback"]
    assert errors["full"] < 0.97 * errors["rotate"]


def test_restore_makes_up_for_what_is_dropped() -> None:
    """<D^, D> gains what the dropped components lose."""
    torch.manual_seed(0)
    delta = torch.randn(200, 220)
    budget = 0.3 * delta.numel()
    shares = {}
    for restore in (0.0, 1.0):
        terms = make_method("rate-distortion", restore=restore, flat_weight=0.0).compress(MatrixDelta(delta), budget)
        shares[restore] = float((rebuilt(terms, delta) * delta).sum() / delta.square().sum())
    assert shares[0.0] < 0.6 and shares[1.0] > shares[0.0] + 0.1


def test_an_embedding_is_changed_in_few_rows() -> None:
    torch.manual_seed(0)
    delta = torch.zeros(1000, 48)
    rows = torch.randperm(1000)[:90].sort().values
    delta[rows] = make_delta(90, 48)
    terms = make_method("rate-distortion").compress(MatrixDelta(delta, is_embedding=True), 30_000.0)
    assert terms and all(isinstance(term, Factored) and term.rotated == "v" for term in terms)
    assert sum(8 * term_bytes(term) for term in terms) + 1000 <= 30_000
    again = add_terms(torch.zeros_like(delta), terms)
    covered = torch.cat([term.rows for term in terms if term.rows is not None]).unique()
    assert set(covered.tolist()) == set(rows.tolist())  # the others are the base's, exactly
    assert set(again.any(dim=1).nonzero()[:, 0].tolist()) == set(rows.tolist())
    assert float((again - delta).norm() / delta.norm()) < 0.25


def test_rows_of_an_embedding_are_coded_by_the_size_of_their_change() -> None:
    """Classes take less error than one code for all rows, and a class may get nothing."""
    torch.manual_seed(0)
    sizes = torch.cat((torch.full((100,), 1.0), torch.full((100,), 0.1), torch.full((600,), 0.01)))
    order = torch.randperm(800)
    delta = (make_delta(800, 40) * sizes[:, None])[order]
    spectra, _ = make_method("rate-distortion").spectra(MatrixDelta(delta, is_embedding=True))
    assert [spectrum.shape for spectrum in spectra] == [(100, 40), (100, 40), (200, 40), (400, 40)]
    terms = make_method("rate-distortion").compress(MatrixDelta(delta, is_embedding=True), 20_000.0)
    assert sum(8 * term_bytes(term) for term in terms) + 2 * 800 <= 20_000
    first = next(term.rows for term in terms)
    assert set(first.tolist()) == set((sizes[order] == 1).nonzero()[:, 0].tolist())
    found = float((rebuilt(terms, delta) - delta).norm() / delta.norm())
    plain = make_method("rate-distortion", restore=0.0).compress(MatrixDelta(delta, layers=1), 20_000.0)
    assert found < 0.8 * float((rebuilt(plain, delta) - delta).norm() / delta.norm())


def test_an_embedding_no_taller_than_wide_is_coded_as_a_whole() -> None:
    terms = make_method("rate-distortion").compress(MatrixDelta(make_delta(100, 40), is_embedding=True), 9000.0)
    assert terms and all(isinstance(term, Factored) and term.rows is None for term in terms)


def test_a_budget_too_small_for_one_component_gives_no_terms() -> None:
    assert make_method("rate-distortion").compress(MatrixDelta(make_delta(40, 50)), 60.0) == []
