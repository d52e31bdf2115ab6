"""The leading components of a delta."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Components below this share of the largest singular value are rounding noise of a float32 delta.
NEGLIGIBLE = 1e-6
# Of the largest eigenvalue of a Gram matrix, what float32 leaves of the others is known to a per cent from here on.
FLOAT32_LIMIT = 1e-5
LOST = 1 / 4  # of the eigenvalues may lie below it, as the last ones of a square matrix do; more of them: low rank
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Basis:
    """What is costly in a decomposition of a delta (m, n).

    s: all singular values that are not negligible, float64, descending. vectors: the first eigenvectors of the smaller
    Gram matrix, (min(m, n), count).
    """

    s: Tensor
    vectors: Tensor


def leading_components(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` components of a delta (m, n), fewer if the delta's rank is smaller; as `split_components`."""
    u, s, v, _ = split_components(delta, rank, find_basis(delta, rank))
    return u, s, v


def find_basis(delta: Tensor, most: int) -> Basis:
    """The basis of a delta (m, n), with up to `most` vectors.

    Through the smaller Gram matrix: faster than an SVD, and lighter in memory for tall matrices. In float32 where that
    is enough, else in float64, see `_eigen`; docs/methods.md has the measurements.
    """
    values, vectors = _eigen(delta if delta.shape[0] >= delta.shape[1] else delta.T)
    s = values.flip(0).double().clamp_min_(0).sqrt_()
    s = s[s > NEGLIGIBLE * s[0]]
    return Basis(s, vectors.flip(1)[:, : min(most, len(s))])


def split_components(delta: Tensor, rank: int, basis: Basis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `rank` components of a delta (m, n), fewer if the delta's rank is smaller, and the rest's size.

    Args:
        basis: the delta's, with as many vectors.

    Returns:
        u (rank, m), s (rank,), v (rank, n), float32; the rows of u and v are unit singular vectors, s descends. And the
        other singular values that are not negligible.
    """
    m, n = delta.shape
    if m < n:
        v, s, u, rest = split_components(delta.T, rank, basis)
        return u, s, v, rest
    v = basis.vectors[:, :rank]
    v = v.float() if v.dtype == torch.float16 else v
    keep = v.shape[1]
    u = torch.empty(keep, m, dtype=torch.float32, device=delta.device)
    norms = torch.zeros(keep, dtype=torch.float64, device=delta.device)
    for start in range(0, m, ROWS_AT_ONCE):
        part = delta[start : start + ROWS_AT_ONCE].to(v.dtype) @ v
        norms += part.square().sum(0, dtype=torch.float64)
        u[:, start : start + part.shape[0]] = part.T
    s = norms.sqrt_().float()
    return u.div_(s[:, None]), s, v.T.float(), basis.s[rank:].float()


def _eigen(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of deltaT delta, ascending, and eigenvectors: in float32 unless the rank is low.

    Squaring the singular values leaves float32 those above 1/300 of the largest, which are all that matter, unless the
    delta is a product of few factors, whose number float64 shows.
    """
    found: tuple[Tensor, Tensor]
    for dtype in (torch.float32, torch.float64):
        found = torch.linalg.eigh(_gram(delta, dtype))
        values = found[0]
        if (values <= FLOAT32_LIMIT * values[-1]).float().mean() <= LOST:  # `<=`: where float32 has them all at zero
            break
    return found


def _gram(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """deltaT delta (n, n)."""
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=dtype, device=delta.device)
    for rows in delta.split(ROWS_AT_ONCE):  # no copy of the whole delta
        rows = rows.to(dtype)
        gram.addmm_(rows.T, rows)
    return gram
