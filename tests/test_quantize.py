import pytest
import torch
from torch import Tensor

from deltacome.compression.quantizers import (
    DAMPING,
    NORMAL_STEP,
    feed_back_entries,
    feed_back_in_blocks,
    fit_scale,
    fit_steps,
    quantize_entries_with_feedback,
    quantize_rows,
    quantize_vectors_with_feedback,
)
from deltacome.compression.svd import leading_components

# Squared error of the uniform mid-rise code for a unit normal variable, by bit-width (Max, 1960, table 2).
DISTORTION = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00350, 6: 0.00104, 7: 0.000304, 8: 0.0000869}


def widths(bits: int | list[int], rows: int = 1) -> Tensor:
    return torch.tensor(bits if isinstance(bits, list) else [bits] * rows)[:, None]


def inputs_moment(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Second moment of strongly correlated inputs."""
    torch.manual_seed(n)
    x = torch.randn(4 * n, n, dtype=dtype) @ torch.randn(n, n, dtype=dtype) * torch.logspace(0, -1, n, dtype=dtype)
    return x.T @ x / len(x)


@pytest.mark.parametrize("bits", list(DISTORTION))
def test_distortion_on_normal_entries_is_maxs(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(4, 200_000)
    step = torch.full((4, 1), NORMAL_STEP[bits])
    result = quantize_rows(x, widths(bits, 4))
    scaled = result.values * fit_scale(result.values, x, "least-squares")[:, None]
    assert float((scaled - x).square().mean()) == pytest.approx(DISTORTION[bits], rel=0.06)
    if bits > 1:
        assert torch.allclose(fit_steps(x, widths(bits, 4)), step, rtol=0.2)


def test_sixteen_bits_are_nearly_exact_on_heavy_tails() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5000) ** 5
    error = (quantize_rows(x, widths(16, 3)).values - x).norm() / x.norm()
    assert error < 2e-3


def test_scales() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(6, 301))
    values = quantize_rows(x, widths(2, 6)).values
    unbiased = values * fit_scale(values, x, "unbiased")[:, None]
    least = values * fit_scale(values, x, "least-squares")[:, None]
    torch.testing.assert_close((unbiased * x).sum(1), torch.ones(6))
    assert ((least * x).sum(1) < 0.95).all()  # the shrinkage
    for factor in (0.98, 1.02):
        assert ((factor * least - x).norm(dim=1) > (least - x).norm(dim=1)).all()
    assert torch.equal(fit_scale(values, x, "minmax"), torch.ones(6))
    assert torch.equal(fit_scale(values, torch.zeros_like(x), "unbiased"), torch.zeros(6))


@pytest.mark.parametrize(("length", "size"), [(300, 128), (128, 128), (5, 128), (33, 10)])
def test_groups_span_their_range(length: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, length)
    result = quantize_rows(x, widths([2, 3, 4, 8]), size)
    assert result.ranges is not None and result.ranges.scale.shape == (4, -(-length // size))
    for row, bits in enumerate([2, 3, 4, 8]):
        for group, part in enumerate(x[row].split(size)):
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = (high - low) / (2**bits - 1)
            found = result.values[row, group * size : group * size + len(part)]
            assert float((found - part).abs().max()) <= 1.01 * scale
            assert float(result.ranges.scale[row, group]) == pytest.approx(scale, rel=1e-3)


def plain_gptq(x: Tensor, moment: Tensor, bits: int) -> Tensor:
    """Optimal brain quantization in a fixed order, in float64, inverting the rest of H anew for every column."""
    x, w = x.double(), x.double().clone()
    moment = moment.double() / moment.double().diagonal().mean()
    moment = moment + DAMPING * torch.eye(len(moment), dtype=torch.float64)
    step = fit_steps(x.float(), widths(bits, len(x))).double()[:, 0]
    values = torch.zeros_like(w)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(moment[j:, j:])
        codes = (w[:, j] / step).floor().add(2 ** (bits - 1)).clamp(0, 2**bits - 1)
        values[:, j] = (codes - (2**bits - 1) / 2) * step
        error = (w[:, j] - values[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return values


@pytest.mark.parametrize(("rows", "length", "bits"), [(3, 40, 2), (5, 150, 3), (1, 7, 1)])
def test_feedback_along_entries_is_plain_gptq(rows: int, length: int, bits: int) -> None:
    torch.manual_seed(0)
    x, moment = torch.randn(rows, length), inputs_moment(length)
    found = quantize_entries_with_feedback(x, moment, widths(bits, rows)).values
    expected = plain_gptq(x, moment, bits).float()
    differ = (found - expected).abs() > 1e-4  # a tie may fall otherwise in float32 and drag its followers along
    assert differ.float().mean() < 0.02


@pytest.mark.parametrize(("rows", "length"), [(1, 4), (5, 8), (3, 10)])
def test_feedback_in_blocks_is_that_of_a_matrix_of_blocks(rows: int, length: int) -> None:
    size, blocks = 4, -(-length // 4)
    factors = torch.linalg.cholesky(torch.stack([inputs_moment(size) for _ in range(blocks)]), upper=True)
    factors *= torch.rand(blocks, 1, 1) + 0.5
    x, bits = torch.randn(rows, length), widths([1, 2, 3, 4, 8][:rows])
    whole = feed_back_entries(x, torch.block_diag(*factors)[:length, :length], bits)
    result = feed_back_in_blocks(x, factors, bits)
    assert torch.equal(result.codes, whole.codes) and torch.equal(result.step, whole.step)
    torch.testing.assert_close(result.values, whole.values)


@pytest.mark.parametrize("group_size", [0, 16])
def test_feedback_lowers_the_output_error(group_size: int) -> None:
    torch.manual_seed(1)
    x, moment = torch.randn(20, 100), inputs_moment(100)
    bits = widths([8, 3, 2, 2] * 5)
    nearest = quantize_rows(x, bits, group_size).values - x
    fed_back = quantize_entries_with_feedback(x, moment, bits, group_size).values - x

    def output_error(error: Tensor) -> Tensor:
        return ((error @ moment) * error).sum(1)

    assert (output_error(fed_back)[1:] < output_error(nearest)[1:]).float().mean() > 0.9
    assert output_error(fed_back).sum() < 0.7 * output_error(nearest).sum()


@pytest.mark.parametrize("group_size", [0, 16])
def test_feedback_along_vectors_lowers_the_output_error(group_size: int) -> None:
    torch.manual_seed(2)
    x, moment = torch.randn(30, 90), inputs_moment(30)
    bits = widths([4] * 10 + [2] * 20)
    nearest = quantize_rows(x, bits, group_size).values - x
    result = quantize_vectors_with_feedback(x, moment, bits, group_size)
    fed_back = result.values - x
    assert result.codes.shape == x.shape and (result.ranges is not None) == bool(group_size)
    errors = [float(torch.trace(error.T @ moment @ error)) for error in (fed_back, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_feedback_stands_a_singular_moment() -> None:
    x = torch.randn(2, 8)
    for moment in (torch.zeros(8, 8), torch.ones(8, 8)):
        assert torch.isfinite(quantize_entries_with_feedback(x, moment, widths(2, 2)).values).all()


@pytest.mark.parametrize(("m", "n"), [(40, 40), (300, 17), (17, 5000), (9000, 20)])
def test_components_are_those_of_an_svd(m: int, n: int) -> None:
    torch.manual_seed(m)
    delta = torch.randn(m, n) * 1e-4
    u, s, v = leading_components(delta, 10)
    expected = torch.linalg.svd(delta.double(), full_matrices=False)
    torch.testing.assert_close(s, expected.S[:10].float(), rtol=1e-5, atol=0)
    best = (expected.U[:, :10] * expected.S[:10]) @ expected.Vh[:10]
    torch.testing.assert_close((u.T * s) @ v, best.float(), rtol=1e-3, atol=1e-3 * float(s[0]) / (m * n) ** 0.5)
    torch.testing.assert_close(u @ u.T, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.T, torch.eye(10), rtol=0, atol=1e-5)


def test_components_of_a_low_rank_delta_stop_at_its_rank() -> None:
    torch.manual_seed(0)
    delta = torch.randn(50, 3) @ torch.randn(3, 40)
    assert len(leading_components(delta, 20)[1]) == 3
