"""A sketch of what is left out: one-bit components of which one side is given and the other one follows.

Singular vectors of a flat spectrum are no better than any other directions, and are distorted on either side. A sketch
takes orthogonal directions p of signs, which one bit has exactly, and of the rest R only the signs of R p: raised so
that <sketch, R> = |R|², it is noise, and no bias. It has the form of components, so that nothing that reads them has to
know.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.format.rotation import rotate, signs_of, unrotate

PROBES = 16


@dataclass(frozen=True)
class Rest:
    """What kept components leave of a delta.

    values: the delta, (m, n). u, s, v: the kept components, (rank, m), (rank,) and (rank, n), u being orthonormal.
    """

    values: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    def along(self, inputs: Tensor) -> Tensor:
        """The outputs (count, m) for inputs (count, n)."""
        return inputs @ self.values.T - ((inputs @ self.v.T) * self.s) @ self.u

    def against(self, outputs: Tensor) -> Tensor:
        """The transposed product (count, n) with (count, m)."""
        return outputs @ self.values - ((outputs @ self.u.T) * self.s) @ self.v

    def energy(self) -> float:
        """The sum of its squares, for the kept u are orthonormal and orthogonal to it."""
        kept = (self.s.square() * self.v.square().sum(1)).sum()
        return max(0.0, float(self.values.square().sum() - kept))


def flatness(values: Tensor) -> float:
    """(Σ s²)² / (N Σ s⁴) of the N singular values of a matrix (m, n): 1 if all are one, 1 / N if there is one alone.

    The fourth powers are estimated, by what the matrix and its transpose make of a few directions.
    """
    directions = _directions(PROBES, values.shape[1]).to(values)
    fourth = ((directions @ values.T) @ values).double().square().sum() / PROBES
    return float(values.double().square().sum().square() / (min(values.shape) * fourth))


def noise(shape: tuple[int, int], count: int) -> float:
    """The energy of a sketch's error as a share of the rest's, `count` components for a matrix (m, n)."""
    return math.pi / 2 * min(shape) / count - 1


def sketch(rest: Rest, count: int, is_rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one bit of u (count, m) and v (count, n), of rotated vectors or of plain ones, and scales (count,).

    As `Factored.from_codes` takes them. count: of components, at most the shorter side.
    """
    m, n = rest.values.shape
    given = _directions(count, min(m, n)).to(rest.values)
    plain = unrotate(given) if is_rotated else given
    found = rest.along(plain) if n <= m else rest.against(plain)
    found = rotate(found) if is_rotated else found
    squares, sums = found.square().sum(1), found.abs().sum(1)
    raised = rest.energy() * min(m, n) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    # An entry is half of a sign on each side.
    scale = 4 * raised / min(m, n) * squares / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    codes = (found >= 0).int(), (given >= 0).int()
    return (*(codes if n <= m else codes[::-1]), scale)


def _directions(count: int, length: int) -> Tensor:
    """Signs (count, length), the rows orthogonal or nearly: of Walsh functions, cut, with random signs of the columns.

    Without these, rotated back in blocks, a direction would be a few of the entries.
    """
    both = torch.arange(count)[:, None] & torch.arange(length)
    for shift in (16, 8, 4, 2, 1):
        both ^= both >> shift
    return (1 - 2 * (both & 1)) * signs_of(length)
