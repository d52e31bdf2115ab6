"""Directions of signs that every reader knows, so that a sketch's are in no file; `docs/format.md` defines them."""

import torch
from torch import Tensor

from deltacome.format.bits import pack, words_per_row
from deltacome.format.rotation import signs_of


def directions(count: int, length: int) -> Tensor:
    """`count` directions of `length` signs, as packed codes of one bit that is set for +1: int32, (count, words).

    Walsh functions, cut to the length, so that they are orthogonal or nearly, with random signs of the entries: without
    these, rotated back in blocks, a direction would be a few of the entries. Made a word at a time, as a large model's
    are of many entries.
    """
    number, word = torch.arange(count)[:, None], torch.arange(words_per_row(length, 1))
    inside = torch.arange(32)
    minus = pack(_parity(inside[:, None] & inside), 1)[number[:, 0] % 32] ^ -_parity(number // 32 & word)
    plus = pack((signs_of(length) > 0).int()[None], 1)
    return (minus ^ plus) & pack(torch.ones(1, length, dtype=torch.int32), 1)


def _parity(numbers: Tensor) -> Tensor:
    """1 where an odd number of a number's lowest 32 bits are set, else 0: int32."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return (numbers & 1).int()
