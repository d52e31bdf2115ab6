"""The leading components of a delta."""

import torch
from torch import Tensor

# Components below this share of the largest singular value are rounding noise of a float32 delta.
NEGLIGIBLE = 1e-6
ROWS_AT_ONCE = 4096


def leading_components(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` components of a delta (m, n), fewer if the delta's rank is smaller; as `split_components`."""
    u, s, v, _ = split_components(delta, rank)
    return u, s, v


def split_components(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `rank` components of a delta (m, n), fewer if the delta's rank is smaller, and the rest's size.

    Through the eigenvectors of the smaller Gram matrix in float64: faster than a float32 SVD for the matrices of a
    layer, lighter in memory for tall ones, and as accurate, since squaring the singular values costs half of
    float64's digits and float32 has no more than the other half.

    Returns:
        u (rank, m), s (rank,), v (rank, n), float32; the rows of u and v are unit singular vectors, s descends. And the
        other singular values that are not negligible.
    """
    m, n = delta.shape
    if m < n:
        v, s, u, rest = split_components(delta.T, rank)
        return u, s, v, rest
    values, vectors = torch.linalg.eigh(_gram(delta))
    s = values.flip(0).clamp_min_(0).sqrt_()
    s = s[s > NEGLIGIBLE * s[0]]
    keep, rest = min(rank, len(s)), s[rank:].float()
    v = vectors.flip(1)[:, :keep]
    u = torch.empty(keep, m, dtype=torch.float32, device=delta.device)
    norms = torch.zeros(keep, dtype=torch.float64, device=delta.device)
    for start in range(0, m, ROWS_AT_ONCE):
        part = delta[start : start + ROWS_AT_ONCE].double() @ v
        norms += part.square().sum(0)
        u[:, start : start + part.shape[0]] = part.T
    s = norms.sqrt_().float()
    return u.div_(s[:, None]), s, v.T.float(), rest


def singular_values(delta: Tensor) -> Tensor:
    """All singular values of a delta (m, n) that are not negligible, float64, descending."""
    s = torch.linalg.eigvalsh(_gram(delta if delta.shape[0] >= delta.shape[1] else delta.T)).flip(0)
    s = s.clamp_min_(0).sqrt_()
    return s[s > NEGLIGIBLE * s[0]]


def _gram(delta: Tensor) -> Tensor:
    """deltaT delta (n, n) in float64."""
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=torch.float64, device=delta.device)
    for rows in delta.split(ROWS_AT_ONCE):  # no float64 copy of the whole delta
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    return gram
