import pytest
import torch
from torch import Tensor

from conftest import term_bytes
from deltacome.compression.methods import METHODS, MatrixDelta, make_method
from deltacome.errors import DeltacomeError
from deltacome.format.terms import Factored, Sign, Term, add_terms


def make_delta(m: int, n: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    u, s, v = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return 1e-3 * (u * s * torch.arange(1, len(s) + 1) ** -0.7) @ v


def rebuilt(terms: list[Term], delta: Tensor) -> Tensor:
    return add_terms(torch.zeros_like(delta), terms)


def relative_error(terms: list[Term], delta: Tensor) -> float:
    return float((rebuilt(terms, delta) - delta).norm() / delta.norm())


@pytest.mark.parametrize("scale", ["unbiased", "least-squares", "minmax"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("m", "n"), [(96, 130), (130, 96), (61, 61)])
def test_delta_come(scale: str, calibrated: bool, m: int, n: int) -> None:
    delta = make_delta(m, n)
    budget = 2.0 * m * n
    x = torch.randn(4 * n, n)
    terms = make_method("delta-come", scale=scale).compress(
        MatrixDelta(delta, second_moment=x.T @ x / len(x) if calibrated else None), budget
    )
    assert 0.9 * budget < sum(8 * term_bytes(term) for term in terms) <= budget
    assert [term.bits for term in terms if isinstance(term, Factored)] == [8, 3, 2][: len(terms)]
    assert relative_error(terms, delta) < 0.55
    if scale == "unbiased":
        assert float((rebuilt(terms, delta) * delta).sum()) > 0.75 * float(delta.square().sum())


def test_unbiased_does_not_shrink_and_least_squares_does() -> None:
    """What is kept of each component, <D^, u v^T> / s, is 1 on average for the one and below it for the other."""
    delta = make_delta(200, 220)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = {}
    for scale in ("unbiased", "least-squares"):
        found = rebuilt(
            make_method("delta-come", scale=scale, precision="2:60").compress(MatrixDelta(delta), 0.0), delta
        )
        kept[scale] = float((torch.einsum("mk,mn,kn->k", u, found, v) / s)[:60].mean())
    assert kept["unbiased"] == pytest.approx(1.0, abs=0.01)
    assert kept["least-squares"] == pytest.approx(0.78, abs=0.03)  # (1 - 0.119)^2


def test_low_rank_is_the_truncated_svd() -> None:
    delta = make_delta(80, 90)
    (term,) = make_method("low-rank").compress(MatrixDelta(delta), 16.0 * 170 * 12 + 16 * 12)
    assert isinstance(term, Factored) and term.rank == 12
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    best = (u[:, :12] * s[:12]) @ v[:12]
    assert float((term.dequantize() - best).norm() / best.norm()) < 2**-8  # the scales are bfloat16


def test_bitdelta_scales() -> None:
    delta = make_delta(70, 45)
    (term,) = make_method("bitdelta").compress(MatrixDelta(delta), 0.0)
    assert isinstance(term, Sign)
    torch.testing.assert_close(term.dequantize(), delta.abs().mean() * torch.where(delta >= 0, 1.0, -1.0))
    x = torch.randn(500, 45) @ torch.randn(45, 45)
    (refit,) = make_method("bitdelta", scale="refit").compress(MatrixDelta(delta, second_moment=x.T @ x / len(x)), 0.0)
    assert isinstance(refit, Sign)

    def output_error(factor: float) -> float:
        return float(((refit.dequantize() * factor - delta) @ x.T).norm())

    assert output_error(1.0) < min(output_error(0.99), output_error(1.01))
    assert output_error(1.0) <= float(((term.dequantize() - delta) @ x.T).norm())


def test_methods_at_the_same_budget_in_the_papers_order() -> None:
    delta = make_delta(256, 300)
    budget = 1.0 * delta.numel()
    methods = {name: make_method(name) for name in METHODS if name != "lossless"}
    errors = {name: relative_error(m.compress(MatrixDelta(delta), budget), delta) for name, m in methods.items()}
    assert errors["delta-come"] < errors["low-rank"]


def test_a_budget_too_small_for_one_component_gives_no_terms() -> None:
    assert make_method("delta-come").compress(MatrixDelta(make_delta(40, 50)), 100.0) == []
    assert make_method("low-rank").compress(MatrixDelta(make_delta(40, 50)), 100.0) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nothing", {}, "there is no method 'nothing'; choose from rate-distortion"),
        ("low-rank", {"precision": "2:*"}, "method low-rank has no setting precision"),
        ("delta-come", {"scale": "mean"}, "there is no scale 'mean'"),
        ("delta-come", {"scale": "minmax", "group_size": 0}, "group size of 0 does not go with scale minmax"),
        ("delta-come", {"group_size": -1}, "group size of -1"),
        ("delta-come", {"precision": "huh"}, "precision plan 'huh'"),
        ("bitdelta", {"scale": "unbiased"}, "bitdelta has no scale 'unbiased'"),
    ],
)
def test_bad_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(DeltacomeError, match=message):
        make_method(name, **settings)
