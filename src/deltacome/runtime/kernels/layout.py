"""The order of codes in words as the CPU kernel reads them, and how they get there from the artifact's order.

Codes of other bit-widths than `WIDTHS` are cut into planes. A word has codes of one plane, four in the four bytes at
one place, so that a shift and a mask give four bytes to multiply. A matrix of words has its columns in tiles, see
`packed.Tiled`.
"""

from collections.abc import Iterable

import numpy as np
from numba import njit, types

COLUMNS = 64  # of a tile, which are read in one stream
VECTOR = 16  # of them that are read at once
WIDTHS, GPU_WIDTHS = (8, 4, 2, 1), (4, 2, 1)  # of planes

_WORDS, _OUT, _INT = types.Array(types.int32, 2, "A"), types.int32[::1], types.int64


Run = tuple[int, int, int]  # of planes: the first one's component, how many there are, the first of their bits


def plan_groups(terms: Iterable[tuple[int, int]], widths: tuple[int, ...], unit: int) -> dict[int, list[Run]]:
    """The planes of terms of (bits, rank), by width; the components of all terms are counted through.

    What is left over from whole units of so many bits, of codes side by side, is cut into narrower planes, so that only
    those of one bit are filled up.
    """
    found: dict[int, list[Run]] = {width: [] for width in widths}
    start = 0
    for bits, rank in terms:
        first = 0
        for width in widths:
            while bits - first >= width:
                found[width].append((start, rank, first))
                first += width
        start += rank
    for width, runs in found.items():
        left = sum(count for _, count, _ in runs) % (unit // width) if width > 1 else 0
        while left:
            component, count, first = runs.pop()
            moved = min(left, count)
            if moved < count:
                runs.append((component, count - moved, first))
            found[width // 2] += [(component + count - moved, moved, first + half) for half in (0, width // 2)]
            left -= moved
    return {width: runs for width, runs in found.items() if runs}


def bit_of(i: int, width: int) -> int:
    """Where code i of a word begins."""
    return 8 * (i % 4) + width * (i // 4)


@njit(inline="always")
def _row_of(source, k, first_word, source_width, shift, width, length, row):  # type: ignore[no-untyped-def]
    """Fill `row` with the words of a row of `length` codes of `width` bits, one after the other as the artifact has
    them: of codes of `source_width` bits those from bit `shift` on.
    """
    if source_width == width:
        for w in range(row.size):
            row[w] = source[k, first_word + w]
    else:
        of_source, per_word, mask = 32 // source_width, 32 // width, (1 << width) - 1
        row[:] = 0
        for j in range(length):
            code = source[k, first_word + j // of_source] >> (j % of_source * source_width + shift) & mask
            row[j // per_word] |= np.int32(code << (width * (j % per_word)))


@njit(types.void(_WORDS, *[_INT] * 6, _OUT, _INT, _INT), cache=True)
def lay_columns(source, first_word, source_width, shift, width, length, start, out, rows, columns):  # type: ignore[no-untyped-def]
    """Put the codes of each row of `source`, one below the other, into a matrix of words (rows, columns), from column
    `start` on.

    source: rows of words as the artifact has them, of which the plane from `first_word` on is read, see `_row_of`.
    """
    per_word, in_byte, mask = 32 // width, 8 // width, (1 << width) - 1
    places = np.zeros((4, 256), np.int32)  # what each byte of a word becomes
    for byte in range(4):
        for value in range(256):
            for i in range(in_byte):
                code = byte * in_byte + i
                places[byte, value] |= np.int32((value >> (width * i) & mask) << (8 * (code % 4) + width * (code // 4)))
    row = np.empty(-(-length // per_word), np.int32)
    for k in range(source.shape[0]):
        _row_of(source, k, first_word, source_width, shift, width, length, row)
        column = start + k
        tile = column // COLUMNS * COLUMNS
        left = min(COLUMNS, columns - tile)
        for w in range(row.size):
            word = row[w]
            found = places[0, word & 255] | places[1, word >> 8 & 255]
            out[tile * rows + w * left + column - tile] = (
                found | places[2, word >> 16 & 255] | places[3, word >> 24 & 255]
            )


@njit(types.void(_WORDS, *[_INT] * 6, _OUT, _INT, _INT), cache=True)
def lay_rows(source, first_word, source_width, shift, width, length, start, out, rows, columns):  # type: ignore[no-untyped-def]
    """As `lay_columns`, each row of `source` being codes side by side, from the code `start` of each column on; into
    zeros.
    """
    per_word, mask = 32 // width, np.int32((1 << width) - 1)
    row = np.empty(-(-length // per_word), np.int32)
    for k in range(source.shape[0]):
        _row_of(source, k, first_word, source_width, shift, width, length, row)
        i = (start + k) % per_word
        bit = np.int32(8 * (i % 4) + width * (i // 4))
        for w in range(row.size):
            column = w * per_word
            tile = column // COLUMNS * COLUMNS
            place = tile * rows + (start + k) // per_word * min(COLUMNS, columns - tile) + column - tile
            own = out[place : place + min(per_word, length - column)]
            word = row[w]
            for j in range(own.size):
                own[j] |= ((word >> np.int32(width * j)) & mask) << bit
