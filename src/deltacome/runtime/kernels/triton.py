"""The GPU kernel: packed codes times a few rows, one launch per stage for all bit-widths and all tenants of a matrix.

Both products of a delta are sums over the codes of words, so that one kernel computes them. What a program does lies in
tables on the device, with addresses of the packed words: those of a delta are made once, and a batch says which rows
go through which; a CUDA graph can be captured of the rest. Rotations, with what comes before and after them, are
a launch or two each.
"""

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.format.rotation import signs_of, unrotate
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import TILE, Packed, for_gpu
from deltacome.runtime.kernels.reference import columns

__all__ = ["Work", "columns"]

MOST_ROWS = 16  # of one delta; from there on, taking the codes apart once and two dense products are faster

# Columns that a program computes, words of each that it reads at a time, and warps, of the two stages.
INNER = (32, 64, 4)
OUTER = (128, 8, 4)
ONE = 0x3F800000  # 1.0; as an argument it is in a register, and one instruction cuts a code out and makes it a number
TILED = tl.constexpr(TILE)
HEAD = tl.constexpr(7)  # numbers of an entry before its planes
PLANE = tl.constexpr(5)  # numbers of a plane


class Work:
    """What one matrix of a batch has to do: as `reference.Work`."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        def is_few(packed: Packed, rows: Tensor) -> bool:
            has_one_kind = (packed.terms != ()) + (packed.signs is not None) + (packed.grouped != ()) == 1
            return has_one_kind and not packed.grouped and len(rows) <= MOST_ROWS

        few = [delta for delta in deltas if is_few(*delta)]
        self.few = _Few(few) if few else None
        self.many = reference.Work([delta for delta in deltas if not is_few(*delta)])

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        if self.few is not None:
            self.few.add(y, x)
        self.many.add(y, x)


@dataclass(frozen=True, eq=False)
class _Entries:
    """What the two stages do for a delta, a row each: see `_entry`.

    length: numbers that go into both stages. owned: tensors that addresses are of, besides the delta's own.
    """

    inner: list[list[int]]
    outer: list[list[int]]
    length: int
    owned: tuple[Any, ...]

    @classmethod
    def of(cls, packed: Packed) -> "_Entries":
        """The delta's entries, made the first time; they live as long as the delta, addresses being in use."""
        return _entries.get(packed) or _entries.setdefault(packed, cls._make(packed))

    @classmethod
    def _make(cls, given: Packed) -> "_Entries":
        packed = for_gpu(given)
        m, n = packed.shape
        inner, planes, scale = [], [], None
        # A row of the buffer has the inputs, then what the first stage makes of them, with zeros up to whole words.
        start = _whole_words(n)
        for term in packed.terms:
            room = _whole_words(term.rank)
            own = [[p.width, p.first, p.v.words.data_ptr(), p.v.rows, 0] for p in term.planes]
            inner.append(_entry(term.rank, term.scale, start, room, own))
            planes += [[p.width, p.first, p.u.words.data_ptr(), p.u.rows, start] for p in term.planes]
            start += room
        if packed.signs is not None:
            assert packed.sign_scale is not None
            scale = (2 * packed.sign_scale).expand(m).contiguous()
            planes.append([1, 0, packed.signs.words.data_ptr(), packed.signs.rows, 0])
        outputs = packed.factored_rows
        words = None if packed is given else packed  # else the delta and its entries would keep each other alive
        return cls(inner, [_entry(outputs, scale, 0, outputs, planes)], start, (words, scale))


_entries: WeakKeyDictionary[Packed, _Entries] = WeakKeyDictionary()


def _entry(columns: int, scale: Tensor | None, place: int, room: int, planes: list[list[int]]) -> list[int]:
    """How many columns, their scales' address, the output's place and room in its row, and the planes: of each its
    width and first bit, its words' address and their rows, and its input's place in the row. Two numbers are left for
    the rows of the batch.
    """
    address = 0 if scale is None else scale.data_ptr()
    return [0, 0, columns, address, place, room, len(planes), *chain(*planes)]


def _whole_words(length: int) -> int:
    """The numbers that codes of any bit-width, in whole words, are multiplied with."""
    return -(-length // 32) * 32


class _Few:
    """Deltas of a few rows each."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        entries = [_Entries.of(packed) for packed, _ in deltas]
        self.deltas = [packed for packed, _ in deltas]  # the tables have their addresses
        self.rows = torch.cat([rows for _, rows in deltas])
        device = self.rows.device
        counts = [len(rows) for _, rows in deltas]
        starts = [0, *accumulate(counts)]
        self.length = max(own.length for own in entries)
        self.outputs = max(packed.factored_rows for packed in self.deltas)

        def on_device(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

        def stage(lists: list[list[list[int]]]) -> tuple[Tensor, int]:
            rows = [
                [first, count, *entry[2:]]
                for own, first, count in zip(lists, starts, counts, strict=False)
                for entry in own
            ]
            length = max(map(len, rows), default=0)
            room = max((row[5] for row in rows), default=0)
            return on_device([row + [0] * (length - len(row)) for row in rows]), room

        self.inner, self.components = stage([own.inner for own in entries])
        self.outer, _ = stage([own.outer for own in entries])

        def by_outputs(rotated: bool) -> list[tuple[int, Tensor, Tensor]]:
            """How many outputs deltas have that are for all of y, with the numbers of their rows here and in y."""
            found: dict[int, list[int]] = {}
            for packed, first, count in zip(self.deltas, starts, counts, strict=False):
                if packed.rows is None and ("u" in packed.rotated) == rotated:
                    found.setdefault(packed.shape[0], []).extend(range(first, first + count))
            own = ((m, on_device(numbers)) for m, numbers in found.items())
            return [(m, numbers, self.rows[numbers]) for m, numbers in own]

        self.rotated = on_device(np.repeat(["v" in packed.rotated for packed in self.deltas], counts))
        self.numbers = on_device(np.arange(starts[-1]))
        self.to_rotate_back, self.plain = by_outputs(True), by_outputs(False)
        self.some = [
            (packed, packed.rows.long(), slice(starts[i], starts[i + 1]))
            for i, packed in enumerate(self.deltas)
            if packed.rows is not None
        ]

    def add(self, y: Tensor, x: Tensor) -> None:
        count, n = len(self.rows), x.shape[1]
        x = x if x.stride(1) == 1 else x.contiguous()
        buffer = torch.empty(count, self.length, device=x.device)
        product = torch.empty(count, self.outputs, device=x.device)
        _rotate(x, self.rows, buffer, self.numbers, self.rotated, n)
        _multiply(self.inner, self.components, buffer, buffer, INNER)
        _multiply(self.outer, self.outputs, buffer, product, OUTER)
        for m, own, rows in self.to_rotate_back:
            _unrotate_and_add(product, own, y, rows, m)
        for m, own, rows in self.plain:
            y[:, :m].index_add_(0, rows, product[own, :m].to(y.dtype))
        for packed, places, part_rows in self.some:
            part = product[part_rows, : len(places)]
            part = unrotate(part) if "u" in packed.rotated else part
            y[self.rows[part_rows][:, None], places[None]] += part.to(y.dtype)


def _multiply(entries: Tensor, room: int, buffer: Tensor, out: Tensor, shape: tuple[int, int, int]) -> None:
    """A stage: all entries, none of which has more room for its output."""
    block, step, warps = shape
    if len(entries):
        grid = (-(-room // block), len(entries))
        strides = (entries.stride(0), buffer.stride(0), out.stride(0))
        _multiply_kernel[grid](entries, buffer, out, *strides, ONE, block, step, num_warps=warps)


@triton.jit
def _one_and_code(word, width: tl.constexpr, up: tl.constexpr, one):  # type: ignore[no-untyped-def]
    """1 + code / 2^width, the code being moved to the leading bits of a mantissa: cheaper than converting it."""
    moved = (word << up) if up >= 0 else (word >> (-up))
    number = (moved & (((1 << width) - 1) << (23 - width))) | one
    return number.to(tl.float32, bitcast=True)


@triton.jit
def _inner_products(words, rows, width: tl.constexpr, x, k, one, block: tl.constexpr, step: tl.constexpr):  # type: ignore[no-untyped-def]
    """`sum_j x[j] (code[j, k] - middle)` of a plane's codes, for the columns k, in parts that are still to be added:
    (step, block). Behind the last code x is zero.
    """
    per_word: tl.constexpr = 32 // width
    w = tl.arange(0, step)
    start = k // TILED * TILED * rows + k % TILED
    # Told what is aligned, Triton loads four words at once, and a thread takes four columns for a number of x.
    places = tl.multiple_of(tl.max_contiguous(start[None] + w[:, None] * TILED, [1, TILED]), [1, TILED])
    sums = tl.zeros((step, block), tl.float32)
    x_sums = tl.zeros((step,), tl.float32)
    for first in range(0, rows, step):
        known = w < rows - first
        word = tl.load(words + first * TILED + places, mask=known[:, None], other=0)
        for i in tl.static_range(per_word):
            factor = tl.load(x + (first + w) * per_word + i, mask=known, other=0.0)
            sums += factor[:, None] * _one_and_code(word, width, 23 - width - i * width, one)
            x_sums += factor
    return sums * (1 << width) - x_sums[:, None] * ((1 << width) + ((1 << width) - 1) / 2)


@triton.jit
def _multiply_kernel(  # type: ignore[no-untyped-def]
    entries, buffer, out, entry_stride, stride, out_stride, one, block: tl.constexpr, step: tl.constexpr
):
    """Some columns of an entry: `(input codes) * scale`, for each of its rows."""
    entry = entries + tl.program_id(1) * entry_stride
    first_row, row_count, columns = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2).to(tl.int32)
    scales, place = tl.load(entry + 3).to(tl.pointer_type(tl.float32)), tl.load(entry + 4)
    room, plane_count = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    k = tl.program_id(0) * block + tl.arange(0, block)
    if tl.program_id(0) * block < room:
        read = tl.minimum(k, (columns - 1) // TILED * TILED + k % TILED)  # of the words there are
        for r in range(first_row, first_row + row_count):
            parts = tl.zeros((step, block), tl.float32)
            for p in range(plane_count):
                plane = entry + HEAD + p * PLANE
                width, rows = tl.load(plane), tl.load(plane + 3).to(tl.int32)
                weight = (1 << tl.load(plane + 1)).to(tl.float32)
                words = tl.multiple_of(tl.load(plane + 2).to(tl.pointer_type(tl.int32)), 16)
                x = buffer + r * stride + tl.load(plane + 4)
                if width == 1:
                    parts += weight * _inner_products(words, rows, 1, x, read, one, block, step)
                elif width == 2:
                    parts += weight * _inner_products(words, rows, 2, x, read, one, block, step)
                elif width == 4:
                    parts += weight * _inner_products(words, rows, 4, x, read, one, block, step)
                elif width == 8:
                    parts += weight * _inner_products(words, rows, 8, x, read, one, block, step)
                elif width == 16:
                    parts += weight * _inner_products(words, rows, 16, x, read, one, block, step)
            total = tl.sum(parts, axis=0)
            if scales.to(tl.int64) != 0:
                total *= tl.load(scales + k, mask=k < columns, other=0.0)
            tl.store(out + r * out_stride + place + k, tl.where(k < columns, total, 0.0), mask=k < room)


def _rotate(x: Tensor, rows: Tensor, out: Tensor, out_rows: Tensor, rotated: Tensor, n: int) -> None:
    """`rotation.rotate` of the rows of x that are `rotated`, and the others as they are, to the rows of `out`."""
    p = 1 << (n.bit_length() - 1)
    _transform(x, rows, out, out_rows, rotated, n, 0, padded=_whole_words(n), before=True, after=p < n)
    if p < n:
        _transform(out, out_rows, out, out_rows, rotated, n, n - p)


def _unrotate_and_add(x: Tensor, rows: Tensor, y: Tensor, y_rows: Tensor, n: int) -> None:
    """Add `rotation.unrotate` of the rows of x to the rows of y; those of x are overwritten."""
    p = 1 << (n.bit_length() - 1)
    if p < n:
        _transform(x, rows, x, rows, None, n, n - p, after=True, rest_signs=True)
    _transform(x, rows, y, y_rows, None, n, 0, after=True, rest_signs=True, add=True)


def _transform(
    x: Tensor,
    rows: Tensor,
    out: Tensor,
    out_rows: Tensor,
    rotated: Tensor | None,
    n: int,
    first: int,
    *,
    padded: int = 0,
    before: bool = False,
    after: bool = False,
    rest_signs: bool = False,
    add: bool = False,
) -> None:
    """The Hadamard transform of p entries from `first` on, with signs before and after; the rest with signs or not, and
    zeros up to `padded`.
    """
    bits = n.bit_length() - 1
    # As a Kronecker product of two Hadamard matrices, faster than of three unless they are very small or large.
    halves, thirds = [1, 1 << bits // 2, 1 << (bits + 1) // 2], [1 << (bits + i) // 3 for i in range(3)]
    sides = halves if 8 <= bits <= 13 else thirds
    _transform_kernel[(len(rows),)](
        x, x.stride(0), rows, out, out.stride(0), out_rows, rows if rotated is None else rotated, signs_of(n, x.device),
        n, padded or n, first, 2 ** (-bits / 2), 1 << bits, *sides, before, after, rest_signs, add, rotated is None,
        num_warps=4 if bits < 14 else 8,
    )  # fmt: skip


@triton.jit
def _times_hadamard(x, size: tl.constexpr, d: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, seen as (size / d, d), times a Hadamard matrix of +1 and -1, and transposed; three bring all in place."""
    if d > 1:
        i = tl.arange(0, d)
        parity = i[:, None] & i[None]
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        hadamard = (1 - 2 * (parity & 1)).to(tl.float32)
        x = tl.reshape(x, (size // d, d))
        if d >= 16:
            # In two parts, which the matrix units' short mantissa holds, as it does the ones: nearly exact.
            head = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            x = tl.dot(x - head, hadamard, tl.dot(head, hadamard, input_precision="tf32"), input_precision="tf32")
        else:
            x = tl.sum(x[:, :, None] * hadamard[None], axis=1)
        x = tl.reshape(tl.trans(x), (size,))
    return x


@triton.jit
def _transform_kernel(  # type: ignore[no-untyped-def]
    x, stride, rows, out, out_stride, out_rows, rotated, signs, n, padded, first, scale,
    size: tl.constexpr, d0: tl.constexpr, d1: tl.constexpr, d2: tl.constexpr,
    before: tl.constexpr, after: tl.constexpr, rest_signs: tl.constexpr, add: tl.constexpr, all_rows: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    source = x + tl.load(rows + i) * stride
    target = out + tl.load(out_rows + i) * out_stride
    place = first + tl.arange(0, size)
    value = tl.load(source + place).to(tl.float32)
    sign = tl.load(signs + place)
    transformed = _times_hadamard(value * sign if before else value, size, d2)
    transformed = _times_hadamard(transformed, size, d1)
    transformed = _times_hadamard(transformed, size, d0) * scale
    if after:
        transformed *= sign
    if not all_rows:
        transformed = tl.where(tl.load(rotated + i) != 0, transformed, value)
    if add:
        transformed += tl.load(target + place).to(tl.float32)
    tl.store(target + place, transformed)
    rest = tl.arange(0, size)
    known = rest < n - size
    rest += tl.where(first == 0, size, 0)
    value = tl.load(source + rest, mask=known, other=0.0).to(tl.float32)
    if rest_signs:
        value *= tl.load(signs + rest, mask=known, other=0.0)
    if add:
        value += tl.load(target + rest, mask=known, other=0.0).to(tl.float32)
    tl.store(target + rest, value, mask=known)
    behind = tl.arange(0, 32)
    tl.store(target + n + behind, tl.zeros((32,), tl.float32), mask=behind < padded - n)
