"""A fixed rotation that makes vectors alike: random signs, and Hadamard transforms of blocks of entries.

Low-bit codes of a singular vector err most where its entries are large. Left as it is, that is where the layer's
outlier channels are; rotated, every entry is a mix of many and the error is spread over all of them (QuIP#, Tseng et
al., 2024, section 3). Blocks, and not the whole vector, because a kernel can turn a block while it has it in registers.
`docs/format.md` has the definition.
"""

from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")
BLOCK = 128  # entries; what is left behind the last whole block is cut into the powers of two that it is the sum of


def rotate(x: Tensor) -> Tensor:
    """Rotate the vectors in the last dimension of x (..., n), any n; orthogonal, and of the dtype of x."""
    return _transform(x * signs_of(x.shape[-1], x.device, x.dtype))


def unrotate(x: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return _transform(x) * signs_of(x.shape[-1], x.device, x.dtype)


def rotated_diagonal(values: Tensor) -> Tensor:
    """R diag(values) R^T of n values as its blocks on the diagonal, all others being zero: (blocks, BLOCK, BLOCK).

    The last block is filled up with the identity.
    """
    n = len(values)
    blocks = -(-n // BLOCK)
    place = torch.arange(n, device=values.device)
    x = values.new_zeros(BLOCK, n)
    x[place % BLOCK, place] = values
    for _ in range(2):  # rows of a block, then, the other way round, its columns
        x = torch.nn.functional.pad(rotate(x), (0, blocks * BLOCK - n)).view(BLOCK, blocks, BLOCK).permute(2, 1, 0)
        x = x.reshape(BLOCK, -1)[:, :n]
    whole = torch.nn.functional.pad(x, (0, blocks * BLOCK - n)).view(BLOCK, blocks, BLOCK).permute(1, 2, 0)
    filled = whole[-1, n - (blocks - 1) * BLOCK :, n - (blocks - 1) * BLOCK :]
    filled.diagonal().fill_(1)
    return whole.contiguous()


@cache
def signs_of(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 or -1 for each of n entries: the lowest bit of MurmurHash3's finaliser of the entry's number from 1."""
    h = torch.arange(1, n + 1, dtype=torch.int64)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return (1 - 2 * (h & 1)).to(device, dtype)


def _transform(x: Tensor) -> Tensor:
    n, shape = x.shape[-1], x.shape[:-1]
    whole = n // BLOCK * BLOCK
    parts = [(x[..., :whole].reshape(*shape, -1, BLOCK) @ hadamard(BLOCK, x.device, x.dtype)).reshape(*shape, whole)]
    start = whole
    for size in powers_of(n - whole):
        parts.append(x[..., start : start + size] @ hadamard(size, x.device, x.dtype))
        start += size
    return torch.cat(parts, dim=-1)


def powers_of(number: int) -> list[int]:
    """The powers of two that a number is the sum of, the largest first."""
    return [1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1]


@cache
def hadamard(size: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix in natural order, of a size that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device, dtype)
