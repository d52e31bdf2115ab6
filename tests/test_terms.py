import numpy as np
import pytest
import torch

from conftest import term_bytes
from deltacome.format.bits import BIT_WIDTHS, pack
from deltacome.format.terms import Dense, Factored, Groups, Sign, add_terms, component_bits, groups_per_row


def random_factored(bits: int, m: int, n: int, rank: int, group_size: int = 0) -> tuple[Factored, np.ndarray]:
    """A random term, and its value in float64 by plain loops over components."""
    rng = np.random.default_rng(bits + m + n + rank)
    u, v = (rng.integers(0, 2**bits, (rank, side)) for side in (m, n))
    scale = torch.tensor(rng.standard_normal(rank)).to(torch.bfloat16)
    groups, factors = None, []
    if group_size:
        parts = []
        for codes in (u, v):
            count = groups_per_row(codes.shape[1], group_size)
            scales = rng.random((rank, count)).astype(np.float16)
            zeros = rng.integers(0, 2**bits, (rank, count)).astype(np.uint8)
            parts += [torch.tensor(scales), torch.tensor(zeros)]
            index = np.arange(codes.shape[1]) // group_size
            factors.append((codes - zeros.astype(np.float64)[:, index]) * scales.astype(np.float64)[:, index])
        groups = Groups(group_size, *parts)
    else:
        factors = [codes - (2**bits - 1) / 2 for codes in (u, v)]
    expected = sum(
        (float(scale[k]) * np.outer(factors[0][k], factors[1][k]) for k in range(rank)), start=np.zeros((m, n))
    )
    return Factored.from_codes(bits, torch.tensor(u), torch.tensor(v), scale, groups), expected


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize(("m", "n", "rank"), [(1, 1, 1), (33, 17, 5), (64, 130, 0), (7, 300, 3)])
def test_factored_is_its_float64_reference(bits: int, m: int, n: int, rank: int) -> None:
    term, expected = random_factored(bits, m, n, rank)
    assert term.rank == rank and term.dequantize().shape == (m, n)
    np.testing.assert_allclose(term.dequantize(torch.float64).numpy(), expected, rtol=1e-12, atol=1e-12 * 4.0**bits)
    np.testing.assert_allclose(term.dequantize().numpy(), expected, rtol=1e-4, atol=1e-5 * 4.0**bits)
    assert 8 * term_bytes(term) == rank * component_bits(bits, m, n)


@pytest.mark.parametrize("group_size", [1, 10, 128])
def test_groups_are_their_float64_reference(group_size: int) -> None:
    term, expected = random_factored(3, 37, 129, 4, group_size)
    np.testing.assert_allclose(term.dequantize(torch.float64).numpy(), expected, rtol=1e-12, atol=1e-10)
    assert 8 * term_bytes(term) == 4 * component_bits(3, 37, 129, group_size)


def test_sign() -> None:
    positive = torch.rand(5, 37) > 0.5
    term = Sign((5, 37), pack(positive, 1), torch.tensor([0.25]))
    assert torch.equal(term.dequantize(), torch.where(positive, 0.25, -0.25))


def test_terms_add_up_and_dense_rows_replace() -> None:
    weight = torch.randn(33, 17, dtype=torch.float64)
    term, expected = random_factored(2, 33, 17, 4)
    rows = torch.full((3, 17), 7.0, dtype=torch.bfloat16)
    found = add_terms(weight.clone(), [term, term, Dense(rows, 30)])
    np.testing.assert_allclose(found[:30].numpy(), weight[:30].numpy() + 2 * expected[:30], rtol=1e-10)
    assert (found[30:] == 7).all()
    assert add_terms(torch.tensor(1.0), [Dense(torch.tensor(2.0))]) == 2
