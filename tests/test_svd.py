"""Singular vectors through Gram matrices, in float32 and float64, against torch's SVD in float64."""

import pytest
import torch

from deltacome.compression.svd import find_basis, leading_components, split_components


def decaying(m: int, n: int) -> torch.Tensor:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return (u * s * torch.arange(1, len(s) + 1) ** -0.5) @ v


@pytest.mark.parametrize(("m", "n"), [(60, 60), (109, 60), (60, 109), (17, 5000), (5000, 17)])
@pytest.mark.parametrize("size", [1.0, 1e-24])  # whose squares are nothing in float32
def test_components_are_those_of_an_svd(m: int, n: int, size: float) -> None:
    delta = decaying(m, n) * size
    _, s, v = torch.linalg.svd(delta.double() / size, full_matrices=False)
    basis = find_basis(delta, 12)
    assert torch.allclose(basis.s[:10] / size, s[:10], rtol=1e-4)
    ours_u, ours_s, ours_v, rest = split_components(delta, 10, basis)
    assert torch.allclose(ours_s.double() / size, s[:10], rtol=1e-4)
    assert torch.allclose(rest.double() / size, s[10 : 10 + len(rest)], rtol=1e-2, atol=1e-3 * float(s[0]))
    assert torch.allclose((ours_v.double() @ v[:10].T).abs(), torch.eye(10).double(), atol=1e-3)
    found = (ours_u.T * (ours_s / size)) @ ours_v
    left = (delta / size - found).double().norm()
    assert left == pytest.approx(float(s[10:].norm()), rel=1e-4)


@pytest.mark.parametrize("shape", [(80, 60), (60, 60), (60, 80)])
def test_a_product_of_few_factors_has_as_many_components(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    delta = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    u, s, v = leading_components(delta, 30)
    assert len(s) == len(find_basis(delta, 1).s) == 4
    assert torch.allclose((u.T * s) @ v, delta, atol=1e-4)
