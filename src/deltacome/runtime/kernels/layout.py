"""The order of codes in words as the CPU kernel reads them, and how they get there from the artifact's order.

A word has codes of `WIDTHS` bits, four of them in the four bytes at one place, so that a shift and a mask give four
bytes to multiply. A matrix of words has its columns in tiles, see `packed.Tiled`.
"""

import numpy as np
from numba import njit, types

COLUMNS = 16  # of a tile
WIDTHS = (1, 2, 4, 8)  # of planes; codes of 16 bits are two of 8

_WORDS, _INT = types.Array(types.int32, 2, "A"), types.int64


def planes_of(bits: int) -> list[tuple[int, int]]:
    """(first bit, width) of each plane of a bit-width here."""
    found, first = [], 0
    for width in (8, 8, 4, 2, 1):
        if bits - first >= width:
            found.append((first, width))
            first += width
    return found


def bit_of(i: int, width: int) -> int:
    """Where code i of a word begins."""
    return 8 * (i % 4) + width * (i // 4)


@njit(inline="always")
def _code(source, k, j, first_word, source_width, shift, width):  # type: ignore[no-untyped-def]
    per_word = 32 // source_width
    word = source[k, first_word + j // per_word] >> (source_width * (j % per_word) + shift)
    return word & ((1 << width) - 1)


@njit(types.void(_WORDS, *[_INT] * 6, types.int32[::1], _INT, _INT), cache=True)
def lay_columns(source, first_word, source_width, shift, length, width, start, out, rows, columns):  # type: ignore[no-untyped-def]
    """Add to a zero matrix of words (rows, columns) the codes of each row of `source`, one below the other, from column
    `start` on.

    source: rows of words as the artifact has them, a plane of `source_width` bits from `first_word` on, `length` codes
    each, of which `width` bits from `shift` on are taken.
    """
    per_word = 32 // width
    for k in range(source.shape[0]):
        column = start + k
        tile = column // COLUMNS * COLUMNS
        left = min(COLUMNS, columns - tile)
        for j in range(length):
            code = _code(source, k, j, first_word, source_width, shift, width)
            i = j % per_word
            place = tile * rows + j // per_word * left + column - tile
            out[place] |= np.int32(code << (8 * (i % 4) + width * (i // 4)))


@njit(types.void(_WORDS, *[_INT] * 6, types.int32[::1], _INT, _INT), cache=True)
def lay_rows(source, first_word, source_width, shift, length, width, start, out, rows, columns):  # type: ignore[no-untyped-def]
    """As `lay_columns`, each row of `source` being codes side by side, from the code `start` of each column on."""
    per_word = 32 // width
    for k in range(source.shape[0]):
        row, i = (start + k) // per_word, (start + k) % per_word
        bit = 8 * (i % 4) + width * (i // 4)
        for j in range(length):
            code = _code(source, k, j, first_word, source_width, shift, width)
            tile = j // COLUMNS * COLUMNS
            out[tile * rows + row * min(COLUMNS, columns - tile) + j - tile] |= np.int32(code << bit)
