"""Pack and unpack unsigned codes of 1 to 8 (or 16) bits.

A row of codes becomes a row of 32-bit little-endian words. A bit-width that does not divide 32 evenly is split
into planes of 8, 4, 2 and 1 bits, lowest bits first (3 = a plane of 2 bits, then a plane of 1 bit), so that no
code straddles two words. Within a plane of p bits, code j sits in word `j // (32 // p)` at bit `p * (j % (32 // p))`.
Each plane of each row is padded with zero bits to a whole word. `docs/format.md` is the full specification.
"""

import torch
from torch import Tensor

BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def planes(bits: int) -> list[tuple[int, int]]:
    """(first bit, width) of each plane of a bit-width, in storage order.

    Raises:
        ValueError: if the bit-width is none of `BIT_WIDTHS`.
    """
    if bits not in BIT_WIDTHS:
        raise ValueError(f"no codes of {bits} bits; the bit-widths are {BIT_WIDTHS}")
    if bits == 16:
        return [(0, 16)]
    found, first = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((first, width))
            first += width
    return found


def words_per_row(length: int, bits: int) -> int:
    """How many 32-bit words a row of `length` codes takes."""
    return sum(-(-length * width // 32) for _, width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes, shape (rows, length), values 0 to 2**bits - 1, into int32 words (rows, words_per_row).

    Raises:
        ValueError: if a code does not fit in the bit-width.
    """
    rows, length = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits")
    packed = []
    for first, width in planes(bits):
        per_word = 32 // width
        words = -(-length // per_word)
        plane = (codes.to(torch.int32) >> first) & ((1 << width) - 1)
        plane = torch.nn.functional.pad(plane, (0, words * per_word - length)).reshape(rows, words, per_word)
        word = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
        for j in range(per_word):
            word |= plane[:, :, j] << (width * j)
        packed.append(word)
    return torch.cat(packed, dim=1)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: int32 words (rows, words_per_row) to int32 codes (rows, length).

    Raises:
        ValueError: if the number of words is not that of a row of `length` codes.
    """
    rows = words.shape[0]
    if words.shape[1] != words_per_row(length, bits):
        raise ValueError(f"{words.shape[1]} words a row where {length} codes of {bits} bits take another number")
    codes = torch.zeros(rows, length, dtype=torch.int32, device=words.device)
    start = 0
    for first, width in planes(bits):
        per_word = 32 // width
        count = -(-length // per_word)
        shifts = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
        # >> on int32 carries the sign along; the mask takes it off again.
        plane = (words[:, start : start + count, None] >> shifts) & ((1 << width) - 1)
        codes |= plane.reshape(rows, count * per_word)[:, :length] << first
        start += count
    return codes
