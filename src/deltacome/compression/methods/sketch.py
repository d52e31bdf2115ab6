"""A sketch of what is left out: one-bit components of which one side is given and the other one follows.

Singular vectors of a flat spectrum are no better than any other directions, and each takes bits and is distorted on
both sides. A sketch takes directions p of signs that every reader knows, and of the rest R only the signs of R p:
raised so that <sketch, R> = |R|², it is noise, and no bias. Read, it is components as any others.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.compression.quantizers import fit_scale, quantize_rows
from deltacome.format.bits import pack, unpack
from deltacome.format.directions import directions
from deltacome.format.rotation import rotate, unrotate
from deltacome.format.terms import Factored, Term

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
    directions = _signs(PROBES, values.shape[1]).to(values)
    fourth = ((directions @ values.T) @ values).double().square().sum() / PROBES
    return float(values.double().square().sum().square() / (min(values.shape) * fourth))


def noise(shape: tuple[int, int], count: int) -> float:
    """The energy of a sketch's error as a share of the rest's, `count` components for a matrix (m, n)."""
    return math.pi / 2 * min(shape) / count - 1


def sketch(rest: Rest, count: int, rotated: str) -> Factored:
    """A sketch of `count` components, at most the shorter side; `rotated` as in `Factored`: "uv" or ""."""
    m, n = rest.values.shape
    given = _signs(count, min(m, n)).to(rest.values)
    plain = unrotate(given) if rotated else given
    found = rest.along(plain) if n <= m else rest.against(plain)
    found = rotate(found) if rotated else found
    squares, sums = found.square().sum(1), found.abs().sum(1)
    raised = rest.energy() * min(m, n) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    # An entry is half of a sign on each side.
    scale = 4 * raised / min(m, n) * squares / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    return Factored.sketch((m, n), pack((found >= 0).int(), 1), scale, rotated)


def along_mean(values: Tensor, mean: Tensor, terms: list[Term], bits: int, rotated: str) -> list[Factored]:
    """A component that answers the mean input as the delta does, with what the terms answer; none if they do so.

    Noise is alike in all directions, and inputs are not: a fifth to a half of their energy is their mean's.

    Args:
        values: the delta, (m, n). mean: (n,). rotated: as of `sketch`.
    """
    missing = values @ mean
    for term in terms:
        assert isinstance(term, Factored)
        u, v = term.vectors(values.dtype)
        missing -= (v @ mean * term.scale.to(values.dtype)) @ u
    if not bool(mean.any()) or not bool(missing.any()):
        return []
    u, v = (rotate(x[None]) if rotated else x[None] for x in (missing, mean))
    u_hat, v_hat = (quantize_rows(x, torch.tensor([[bits]], device=x.device)) for x in (u, v))
    scale = fit_scale(u_hat.values, u, "unbiased") * u_hat.step / mean.square().sum()
    scale *= fit_scale(v_hat.values, v, "unbiased") * v_hat.step
    return [Factored.from_codes(bits, u_hat.codes, v_hat.codes, scale, rotated=rotated)]


def _signs(count: int, length: int) -> Tensor:
    """`directions` as +1 and -1, (count, length)."""
    return 2 * unpack(directions(count, length), 1, length) - 1
