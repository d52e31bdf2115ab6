import numpy as np
import pytest
import torch

from deltacome.format.rotation import BLOCK, rotate, rotated_diagonal, unrotate
from format_reader import rotation


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 96, 128, 130, 256, 301])
def test_rotation_is_the_formats_orthogonal_matrix(n: int) -> None:
    torch.manual_seed(n)
    x = torch.randn(4, 3, n, dtype=torch.float64)
    expected = x.numpy() @ rotation(n).T
    np.testing.assert_allclose(rotate(x).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(rotate(x.float()).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(unrotate(rotate(x)), x)
    torch.testing.assert_close(rotate(unrotate(x)), x)


def test_an_outlier_is_spread() -> None:
    for place in (0, 300, 575):
        x = torch.zeros(576)
        x[place] = 1
        assert float(rotate(x).abs().max()) <= 0.125


@pytest.mark.parametrize("n", [1, 100, 128, 300, 512])
def test_a_rotated_diagonal_has_blocks(n: int) -> None:
    values = torch.rand(n, dtype=torch.float64)
    matrix = rotation(n)
    blocks = rotated_diagonal(values)
    padded = torch.block_diag(*blocks)
    expected = matrix @ np.diag(values.numpy()) @ matrix.T
    np.testing.assert_allclose(padded[:n, :n].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(padded[n:, n:], torch.eye(len(blocks) * BLOCK - n, dtype=torch.float64))
    assert not padded[n:, :n].any() and not padded[:n, n:].any()
