"""A fixed rotation that makes vectors alike: random signs and two Hadamard transforms, in n log n steps.

Low-bit codes of a singular vector err most where its entries are large. Left as it is, that is where the layer's
outlier channels are; rotated, every entry is a mix of many and the error is spread evenly over all directions
(QuIP#, Tseng et al., 2024, section 3). `docs/format.md` has the definition.
"""

from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")


def rotate(x: Tensor) -> Tensor:
    """Rotate the vectors in the last dimension of x (..., n), any n; orthogonal, and of the dtype of x."""
    n = x.shape[-1]
    p, signs = _power(n), signs_of(n, x.device, x.dtype)
    x = x * signs
    x = torch.cat((_hadamard(x[..., :p]), x[..., p:]), dim=-1)
    if p < n:
        x = x * signs  # else the second transform would undo much of the first
        x = torch.cat((x[..., : n - p], _hadamard(x[..., n - p :])), dim=-1)
    return x


def unrotate(x: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    n = x.shape[-1]
    p, signs = _power(n), signs_of(n, x.device, x.dtype)
    if p < n:
        x = torch.cat((x[..., : n - p], _hadamard(x[..., n - p :])), dim=-1) * signs
    return torch.cat((_hadamard(x[..., :p]), x[..., p:]), dim=-1) * signs


def _power(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


@cache
def signs_of(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 or -1 for each of n entries: the lowest bit of MurmurHash3's finaliser of the entry's number from 1."""
    h = torch.arange(1, n + 1, dtype=torch.int64)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return (1 - 2 * (h & 1)).to(device, dtype)


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of x (..., p), p a power of two, in natural order.

    That of p = a b entries is a Kronecker product of two small ones: two products instead of log p copies of x.
    """
    p = x.shape[-1]
    a = 1 << ((p.bit_length() - 1) // 2)
    left, right = (_matrix(side, x.device, x.dtype) for side in (a, p // a))
    return (left @ x.reshape(-1, a, p // a) @ right).reshape(x.shape)


@cache
def _matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device, dtype)
