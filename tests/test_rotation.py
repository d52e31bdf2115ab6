import numpy as np
import pytest
import torch

from deltacome.format.rotation import rotate, unrotate
from format_reader import rotation


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 96, 130])
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
        assert float(rotate(x).abs().max()) < 0.15
