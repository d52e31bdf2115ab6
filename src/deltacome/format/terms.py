"""The terms that a compressed weight is a sum of. Methods return them; everything else consumes them.

A weight W of shape (m, n) is rebuilt as `W_base + sum of terms`, a `Dense` term replacing rows instead of adding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltacome.format.bits import pack, unpack, words_per_row
from deltacome.format.directions import directions
from deltacome.format.rotation import unrotate

SCALE_BITS = 16  # a component's scale is one bfloat16
GROUP_BITS = 24  # a group's scale is one float16, its zero point one byte


def groups_per_row(length: int, group_size: int) -> int:
    """How many groups of `group_size` entries a vector of `length` entries has, the last one perhaps shorter."""
    return -(-length // group_size)


def component_bits(bits: int, m: int, n: int, group_size: int = 0) -> int:
    """Bits on disk of one component of an (m, n) matrix: both packed singular vectors and all scales."""
    words = words_per_row(m, bits) + words_per_row(n, bits)
    groups = groups_per_row(m, group_size) + groups_per_row(n, group_size) if group_size else 0
    return 32 * words + SCALE_BITS + GROUP_BITS * groups


def sketch_bits(m: int, n: int) -> int:
    """Bits on disk of one component of a sketch of an (m, n) matrix."""
    return 32 * words_per_row(max(m, n), 1) + SCALE_BITS


@dataclass(frozen=True)
class Groups:
    """Scales and zero points per group of consecutive entries of a singular vector, as in the paper's reference.

    An entry is `scale[k, j // size] * (code - zero[k, j // size])`.
    u_scale, v_scale: float16, (rank, groups of m) and (rank, groups of n). u_zero, v_zero: uint8, the same shapes.
    """

    size: int
    u_scale: Tensor
    u_zero: Tensor
    v_scale: Tensor
    v_zero: Tensor


@dataclass(frozen=True)
class Factored:
    """`sum_k scale[k] * outer(u[k], v[k])`: components of one bit-width, codes packed by `bits.pack`.

    Without groups an entry of u or v is `code - (2**bits - 1) / 2`, and `scale` carries the singular value and
    the steps of both vectors. With groups the entries are scaled per group and `scale` is the singular value.

    u: int32, (rank, words of m). v: int32, (rank, words of n). scale: bfloat16, (rank,). shape: (m, n).
    rotated: the sides whose codes are of rotated vectors (`deltacome.format.rotation`): "", "u", "v" or "uv".
    rows: int64, (m,), ascending: the rows of the weight that the term adds to, its class; None if it adds to all.
    sketched: the shorter side, v if both are as long, has `directions`, which no file needs to hold.
    """

    bits: int
    shape: tuple[int, int]
    u: Tensor
    v: Tensor
    scale: Tensor
    groups: Groups | None = None
    rotated: str = ""
    rows: Tensor | None = None
    sketched: bool = False

    @classmethod
    def from_codes(
        cls,
        bits: int,
        u_codes: Tensor,
        v_codes: Tensor,
        scale: Tensor,
        groups: Groups | None = None,
        rotated: str = "",
        rows: Tensor | None = None,
    ) -> "Factored":
        """Pack integer codes (rank, m) and (rank, n); `scale` (rank,) is rounded to bfloat16."""
        shape = (u_codes.shape[1], v_codes.shape[1])
        u, v = pack(u_codes, bits), pack(v_codes, bits)
        return cls(bits, shape, u, v, scale.to(torch.bfloat16), groups, rotated, rows)

    @classmethod
    def sketch(cls, shape: tuple[int, int], words: Tensor, scale: Tensor, rotated: str = "") -> "Factored":
        """Components of one bit with these words of the longer side's codes: int32, (rank, words of max(m, n))."""
        given = directions(len(words), min(shape)).to(words.device)
        u, v = (words, given) if shape[0] >= shape[1] else (given, words)
        return cls(1, shape, u, v, scale.to(torch.bfloat16), rotated=rotated, sketched=True)

    @property
    def rank(self) -> int:
        return self.u.shape[0]

    def vectors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Dequantized u (rank, m) and v (rank, n), rotated back, without `scale`."""
        return self.left_vectors(dtype), self.right_vectors(dtype)

    def left_vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The u of `vectors` alone."""
        scaling = None if self.groups is None else (self.groups.u_scale, self.groups.u_zero)
        return self._side("u", self.u, self.shape[0], scaling, dtype)

    def right_vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The v of `vectors` alone."""
        scaling = None if self.groups is None else (self.groups.v_scale, self.groups.v_zero)
        return self._side("v", self.v, self.shape[1], scaling, dtype)

    def _side(
        self, side: str, words: Tensor, length: int, scaling: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        codes = unpack(words, self.bits, length).to(dtype)
        if scaling is not None:
            assert self.groups is not None
            return _grouped(codes, *scaling, self.groups.size)
        vectors = codes.sub_((2**self.bits - 1) / 2)
        return unrotate(vectors) if side in self.rotated else vectors

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The term as a matrix (m, n)."""
        u, v = self.vectors(dtype)
        return (u * self.scale.to(dtype)[:, None]).T @ v


@dataclass(frozen=True)
class Sign:
    """`scale * (+1 or -1)` per weight (BitDelta).

    words: int32, (m, words of n), a set bit is +1. scale: float32, (1,).
    """

    shape: tuple[int, int]
    words: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The term as a matrix (m, n)."""
        return unpack(self.words, 1, self.shape[1]).to(dtype).mul_(2).sub_(1).mul_(self.scale.to(dtype))


@dataclass(frozen=True)
class Dense:
    """Exact values that replace the weight's rows from `start` on, in the fine-tuned checkpoint's own dtype."""

    value: Tensor
    start: int = 0


@dataclass(frozen=True)
class Coded:
    """All rows up to those of a `Dense` term, bit for bit, coded by the base's bits (`deltacome.format.coding`).

    It adds nothing to a sum: `checkpoints.rebuilding` decodes it.

    data: uint8, (bytes,). dtype: that the weight has where it is coded, its own or a narrower one.
    """

    data: Tensor
    dtype: torch.dtype


Term = Factored | Sign | Dense | Coded


def of_rows(terms: list[Term], count: int) -> list[Term]:
    """The terms of a weight of `count` rows, as those of one that has more rows behind them."""
    rows = torch.arange(count)
    return [replace(term, rows=rows) if isinstance(term, Factored) and term.rows is None else term for term in terms]


def add_terms(weight: Tensor, terms: list[Term]) -> Tensor:
    """Add the terms to `weight`, a float tensor in the fine-tuned weight's shape, in place; returns it."""
    for term in terms:
        if isinstance(term, Dense):
            if weight.ndim == 0:
                weight.copy_(term.value)
            else:
                weight[term.start : term.start + term.value.shape[0]] = term.value.to(weight.dtype)
        elif isinstance(term, Factored) and term.rows is None:
            u, v = term.vectors(weight.dtype)
            weight.addmm_((u * term.scale.to(weight.dtype)[:, None]).T, v)
        elif isinstance(term, Factored):
            weight[term.rows] += term.dequantize(weight.dtype)
        elif isinstance(term, Sign):
            weight += term.dequantize(weight.dtype)
        else:
            raise TypeError("a coded weight is decoded, and not added to")
    return weight


def _grouped(codes: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    length = codes.shape[1]
    scale, zero = (x.to(codes.dtype).repeat_interleave(size, dim=1)[:, :length] for x in (scale, zero))
    return codes.sub_(zero).mul_(scale)
