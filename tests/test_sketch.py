"""Sketches of what kept components leave: unbiased, of the size that is foretold, and only where a spectrum is flat."""

import pytest
import torch
from torch import Tensor

from deltacome.compression.methods import MatrixDelta, make_method
from deltacome.compression.methods.rate_distortion import FLAT
from deltacome.compression.methods.sketch import Rest, along_mean, flatness, noise, sketch
from deltacome.format.bits import pack, unpack
from deltacome.format.directions import directions
from deltacome.format.rotation import signs_of
from deltacome.format.terms import Factored, Term, add_terms, component_bits, sketch_bits


def flat(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def steep(m: int, n: int) -> Tensor:
    u, s, v = torch.linalg.svd(flat(m, n), full_matrices=False)
    return (u * s * 0.8 ** torch.arange(len(s))) @ v


def rest_of(values: Tensor, rank: int) -> tuple[Rest, Tensor]:
    """What the first components leave, as the sketch has it, and as a matrix."""
    u, s, v = torch.linalg.svd(values, full_matrices=False)
    u, s, v = u.T[:rank], s[:rank], v[:rank]
    return Rest(values, u, s, v), values - (u.T * s) @ v


@pytest.mark.parametrize(("count", "length"), [(1, 1), (7, 9), (33, 31), (40, 64), (100, 203), (576, 576), (3, 1100)])
def test_directions(count: int, length: int) -> None:
    found = directions(count, length)
    assert found.dtype == torch.int32
    signs = signs_of(length).tolist()
    plus = [[((-1) ** (k & j).bit_count() * signs[j] > 0) for j in range(length)] for k in range(count)]
    assert unpack(found, 1, length).bool().tolist() == plus
    assert torch.equal(found, pack(torch.tensor(plus).int(), 1))  # bits behind the last are zero


@pytest.mark.parametrize("shape", [(256, 128), (128, 256), (91, 203), (203, 91), (1, 7), (60, 109)])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("is_rotated", [True, False])
def test_a_sketch_is_noise_alone(shape: tuple[int, int], rank: int, is_rotated: bool) -> None:
    rest, matrix = rest_of(flat(*shape), min(rank, min(shape) - 1))
    energy = float(matrix.double().square().sum())
    assert rest.energy() == pytest.approx(energy, rel=1e-4)
    for count in {max(1, min(shape) // 4), min(shape)}:
        term = sketch(rest, count, "uv" if is_rotated else "")
        assert term.rank == count and term.shape == shape
        found = add_terms(torch.zeros(shape), [term])
        assert float((found * matrix).sum()) == pytest.approx(energy, rel=0.01)  # scales are bfloat16's
        if min(shape) > 50:
            error = float((found - matrix).square().sum()) / energy
            # Walsh functions that are cut are not quite orthogonal.
            assert 0.8 * noise(shape, count) < error < 1.25 * noise(shape, count) + 0.15


def test_no_direction_is_left_out() -> None:
    """What is dropped without a sketch answers as it should, on average, with one."""
    values = flat(256, 256)
    u, s, v = torch.linalg.svd(values)
    answers = {}
    for weight in (0.0, 30.0):
        terms = make_method("rate-distortion", flat_weight=weight).compress(MatrixDelta(values), 0.5 * values.numel())
        found = add_terms(torch.zeros_like(values), terms)
        assert sum(_bits(term) for term in terms) <= 0.5 * values.numel()
        assert sum(term.rank for term in terms if isinstance(term, Factored)) <= 256
        answers[weight] = (u.T @ found @ v.T).diagonal()[150:] / s[150:]
    assert abs(float(answers[0.0].mean())) < 0.1
    assert 0.7 < float(answers[30.0].mean()) < 1.3


@pytest.mark.parametrize("shape", [(256, 192), (60, 203), (8, 1)])
@pytest.mark.parametrize("rotated", ["uv", ""])
def test_the_mean_input_is_answered(shape: tuple[int, int], rotated: str) -> None:
    values, mean = flat(*shape), flat(1, shape[1], seed=1)[0]
    rest, _ = rest_of(values, 0)
    terms: list[Term] = [sketch(rest, max(1, min(shape) // 4), rotated)]
    errors = []
    for more in ([], along_mean(values, mean, terms, 4, rotated)):
        found = add_terms(torch.zeros(shape), [*terms, *more])
        errors.append((found - values).square().sum())
        errors.append(((found - values) @ mean).square().sum())
    assert errors[3] < 0.03 * errors[1]  # what 4 bits leave of a side
    assert errors[2] < errors[0]


def test_the_mean_input_costs_nothing_beside_the_budget() -> None:
    values, mean = flat(256, 200), flat(1, 200, seed=1)[0]
    answers = []
    for known in (None, mean):
        terms = make_method("rate-distortion").compress(MatrixDelta(values, mean=known), 0.5 * values.numel())
        assert sum(_bits(term) for term in terms) <= 0.5 * values.numel()
        assert sum(term.rank for term in terms if isinstance(term, Factored)) <= 200
        answers.append(float(((add_terms(torch.zeros_like(values), terms) - values) @ mean).norm()))
    assert answers[1] < 0.2 * answers[0]
    assert along_mean(values, torch.zeros(200), [], 4, "uv") == along_mean(0 * values, mean, [], 4, "uv") == []


def test_steep_spectra_have_no_sketch() -> None:
    values = steep(200, 220)
    assert flatness(values) < FLAT < flatness(flat(200, 220))
    without, with_one = (
        make_method("rate-distortion", flat_weight=weight).compress(MatrixDelta(values), 0.5 * values.numel())
        for weight in (0.0, 30.0)
    )
    for one, other in zip(without, with_one, strict=True):
        assert isinstance(one, Factored) and isinstance(other, Factored)
        assert torch.equal(one.u, other.u) and torch.equal(one.scale, other.scale)


def test_flatness() -> None:
    assert flatness(torch.eye(80)) == pytest.approx(1)
    for values in (flat(300, 100), flat(100, 300), steep(90, 90)):
        s = torch.linalg.svdvals(values)
        exact = float(s.square().sum() ** 2 / (len(s) * s.pow(4).sum()))
        assert flatness(values) == pytest.approx(exact, rel=0.5)


def _bits(term: Term) -> int:
    assert isinstance(term, Factored)
    return term.rank * (sketch_bits(*term.shape) if term.sketched else component_bits(term.bits, *term.shape))
