"""The GPU kernel: packed codes times a few rows, in integers, for all tenants and matrices that share an input.

Both factors of a product are integers: codes, and numbers in two parts of 8 bits, so a product is exact and runs on
int8 matrix units. Five launches, whatever the number of matrices, tenants and bit-widths: `_prepare` rotates the inputs
and cuts them in parts, `_inner` multiplies them with V's codes, `_scale` makes of the sums the inputs of the second
product, in parts again, `_outer` multiplies these with U's codes, and `_finish` rotates back and adds. What they do
lies in tables on the device: a delta's, made once, and a batch's, so a CUDA graph can be captured of them.
`docs/runtime.md` has the layout, and what of it was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.format.rotation import BLOCK, hadamard, powers_of, signs_of
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import Packed, for_gpu
from deltacome.runtime.kernels.reference import columns

__all__ = ["Room", "SharedWork", "Work", "columns", "planes_of"]

MOST_ROWS, FEW_ROWS = 32, 4  # of a segment, of any size and of a fixed one: a program multiplies all of them
MOST_INPUTS = 1 << 16  # which `_prepare` has in registers
PROGRAMS = 512  # that are enough for a GPU; with fewer, the sums of the first product are split
MOST_SPLITS = 8
FEW = (32, 128, 2)  # of the products with up to 8 rows a segment: columns and bytes at a time, and warps
MANY = (64, 64, 4)
STEP = 128  # bytes at a time at most
LEAST_PARTS = 16 if torch.version.hip else 8  # rows of a segment, twice, that matrix units take
WIDTHS = (4, 2, 1)  # of groups, in the order of their planes
UNIT = 128  # planes that a group's places are a multiple of

# Numbers of a delta's table, of a group in it, and of a segment.
PLANES, OUTPUTS, IS_SIGN, NUMBERS, SIBLINGS, SIBLING_COUNT, FACTORS, SIGNS, TURNS = (tl.constexpr(i) for i in range(9))
GROUPS, GROUP = tl.constexpr(9), tl.constexpr(6)
START, COUNT, V, V_UNITS, U, U_UNITS = (tl.constexpr(i) for i in range(6))
DELTA, X_FIRST, FIRST, ROWS, COLUMN = (tl.constexpr(i) for i in range(5))
SEGMENT = tl.constexpr(5)
SIDE = tl.constexpr(BLOCK)
LARGEST = tl.constexpr(127 * 128)  # of a number in two parts, 128 high + low
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
CHUNK = tl.constexpr(1024)

Delta = tuple[Packed, Tensor]


class Work:
    """What some matrices of a batch that share an input have to do.

    Args:
        deltas: of shapes (m, n), n being the same, each with the numbers (int64) of its rows. Deltas of one row are for
            different outputs.
        firsts: of each delta the output that is its first, by default that of y.
        room: of what `update` is to have room for; then all tables stay where they are.
    """

    def __init__(
        self, deltas: Sequence[Delta], firsts: Sequence[int] | None = None, room: "Room | None" = None
    ) -> None:
        self.room = room
        self._fill(deltas, firsts)

    def update(self, deltas: Sequence[Delta], firsts: Sequence[int] | None = None) -> None:
        """Do the same for other deltas from now on: a CUDA graph of `add` that was captured does so too.

        Raises:
            ValueError: if there is no room for them.
        """
        if self.room is None or not all(_is_fast(packed) for packed, _ in deltas):
            raise ValueError("there is no room for other deltas")
        assert self.fast is not None
        self.fast.fill([(*delta, first) for delta, first in zip(deltas, firsts or [0] * len(deltas), strict=True)])

    def _fill(self, deltas: Sequence[Delta], firsts: Sequence[int] | None) -> None:
        firsts = [0] * len(deltas) if firsts is None else firsts
        both = [(*delta, first) for delta, first in zip(deltas, firsts, strict=True) if len(delta[1])]
        fast = [delta for delta in both if _is_fast(delta[0])]
        self.fast = _Fast(fast, self.room) if fast or self.room else None
        others = [(packed, rows, first) for packed, rows, first in both if not _is_fast(packed)]
        self.others = reference.Work([(packed, rows) for packed, rows, _ in others], [first for *_, first in others])

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        if self.fast is not None:
            self.fast.finish(y, self.fast.compute(x))
        self.others.add(y, x)


class SharedWork:
    """What several layers that share an input have to do, each with an output of its own.

    deltas: of each layer, as of `Work`. The first layer computes for all of them.
    """

    def __init__(self, deltas: Sequence[Sequence[Delta]]) -> None:
        fast = [[(*delta, 0) for delta in own if _is_fast(delta[0])] for own in deltas]
        self.fast = _Fast(list(chain(*fast))) if any(fast) else None
        counts = [sum(len(rows) for _, rows, _ in own) for own in fast]
        self.edges = list(pairwise([0, *accumulate(counts)]))
        self.others = [reference.Work([delta for delta in own if not _is_fast(delta[0])]) for own in deltas]

    def compute(self, x: Tensor) -> Tensor | None:
        """What `finish` adds for each of the layers, while x stays as it is."""
        return None if self.fast is None else self.fast.compute(x)

    def finish(self, layer: int, y: Tensor, x: Tensor, computed: Tensor | None) -> None:
        """As `reference.Work.add` for one of the layers."""
        start, end = self.edges[layer]
        if self.fast is not None and computed is not None and end > start:
            self.fast.finish(y, computed, start, end)
        self.others[layer].add(y, x)


@dataclass(frozen=True)
class Room:
    """How many rows, whosoever's, a `Work` of fixed size takes, and of how many planes and outputs their deltas are.

    planes: as `planes_of` counts them. inputs: n of the matrices. device: where they are.
    """

    rows: int
    planes: int
    outputs: int
    inputs: int
    device: torch.device


def planes_of(packed: Packed) -> int:
    """How many planes a delta has, filled up as the kernels have them: never more than a `Room` may say."""
    return _Table.of(packed).planes


def _is_fast(packed: Packed) -> bool:
    has_one_kind = (packed.terms != ()) + (packed.signs is not None) == 1
    return has_one_kind and not packed.grouped and packed.shape[1] <= MOST_INPUTS


@dataclass(frozen=True, eq=False)
class _Table:
    """What the kernels read of a delta.

    numbers: the table, int64. planes: how many places there are for planes, outputs: how many of the second product.
    owned: the tensors that addresses are of, besides the delta's own.
    """

    numbers: Tensor
    planes: int
    outputs: int
    owned: tuple[Any, ...]

    @classmethod
    def of(cls, packed: Packed) -> "_Table":
        """The delta's, made the first time; it lives as long as the delta, addresses being in use."""
        return _tables.get(packed) or _tables.setdefault(packed, cls._make(packed))

    @classmethod
    def _make(cls, given: Packed) -> "_Table":
        packed = for_gpu(given)
        device = given.device
        m, outputs = packed.shape[0], packed.factored_rows
        groups: list[list[int]] = []
        component, weight = [np.zeros(0, np.int64)], [np.zeros(0)]
        start = 0
        by_width = {group.width: group for group in packed.groups}
        for width in WIDTHS:
            group, count, sides = by_width.get(width), 0, [0, 0, 0, 0]
            if group is not None:
                count = group.count
                sides = [*_line(group.v), *_line(group.u)]
            elif packed.signs is not None and width == 1:
                count, sides = m, [*_line(packed.signs), 0, 0]
            groups.append([start // UNIT, count, *sides])
            places = -(-count // UNIT) * UNIT
            start += places
            own, weights = np.full(places, -1), np.zeros(places)
            if group is not None:
                own[:count] = np.concatenate([np.arange(first, first + n) for first, n, _ in group.runs])
                weights[:count] = np.concatenate([np.full(n, 2.0**bit) for _, n, bit in group.runs])
            elif count:
                own[:count], weights[:count] = np.arange(count), 1.0
            component.append(own)
            weight.append(weights)
        numbers, weights = np.concatenate(component), np.concatenate(weight)
        siblings = torch.from_numpy(_siblings(numbers)).to(device)
        if packed.signs is None:
            scales = torch.cat([term.scale for term in packed.terms])
        else:
            assert packed.sign_scale is not None
            scales = (2 * packed.sign_scale).expand(m)
        # Of each plane its weight in a component, and what comes of the component is multiplied with.
        own_weights = torch.from_numpy(weights).to(device, torch.float32)
        factors = torch.stack((own_weights, scales[torch.from_numpy(numbers.clip(0)).to(device)] * own_weights))
        is_sign = packed.signs is not None
        numbers_of = packed.rows.data_ptr() if packed.rows is not None else 0
        turning = (signs_of(outputs, device), _turns(outputs, device)) if "u" in packed.rotated else ()
        table = [start, outputs, is_sign, numbers_of, siblings.data_ptr(), siblings.shape[1], factors.data_ptr()]
        table += [*([tensor.data_ptr() // 16 for tensor in turning] or (0, 0)), *chain(*groups)]
        words = None if packed is given else packed  # else the delta and its table would keep each other alive
        on_device = torch.tensor(table, dtype=torch.int64, device=device)
        return cls(on_device, start, outputs, (siblings, factors, turning, words))


_tables: WeakKeyDictionary[Packed, _Table] = WeakKeyDictionary()


def _line(side: Any) -> list[int]:
    """Address and bytes of a column of codes, in units of 16."""
    assert side.words.data_ptr() % 16 == 0
    return [side.words.data_ptr() // 16, side.bytes_ // 16]


def _siblings(component: np.ndarray) -> np.ndarray:
    """The places of all planes of a plane's component, itself included: (planes, most), -1 where there are fewer."""
    known = np.flatnonzero(component >= 0)
    order = known[np.argsort(component[known], kind="stable")]
    counts = np.bincount(component[known], minlength=1)
    starts = np.cumsum(counts) - counts
    found = np.full((len(component), max(int(counts.max(initial=1)), 1)), -1, np.int32)
    for i in range(found.shape[1]):
        has = known[counts[component[known]] > i]
        found[has, i] = order[starts[component[has]] + i]
    return found


class _Fast:
    """Deltas that the kernels compute: packed, rows, first output."""

    def __init__(self, deltas: list[tuple[Packed, Tensor, int]], room: Room | None = None) -> None:
        self.room = room
        self.fill(deltas)

    def fill(self, deltas: list[tuple[Packed, Tensor, int]]) -> None:
        """Make the tables, or fill those that are there."""
        room = self.room
        self.deltas = [packed for packed, _, _ in deltas]  # the tables have their addresses
        tables = [_Table.of(packed) for packed in self.deltas]
        self.n = room.inputs if room else self.deltas[0].shape[1]
        device = room.device if room else deltas[0][1].device
        most = MOST_ROWS if room is None else FEW_ROWS
        # Rows of x by whose they are and whether they are rotated: matrices with the same ones share them.
        inputs: dict[tuple[int, bool], int] = {}
        segments: list[list[int]] = []
        x_rows: list[Tensor] = []
        y_rows: list[Tensor] = []
        rotated: list[int] = []
        x_of: list[int] = []
        owner: list[int] = []
        for table, (packed, rows, column) in zip(tables, deltas, strict=True):
            count, key = len(rows), (id(rows), "v" in packed.rotated)
            if key not in inputs:
                inputs[key] = len(rotated)
                x_rows.append(rows)
                rotated += [key[1]] * count
            y_rows.append(rows)
            for first in range(0, count, most):
                own = min(most, count - first)
                x_first = inputs[key] + first
                segments.append([table.numbers.data_ptr(), x_first, len(owner), own, column])
                x_of += range(x_first, x_first + own)
                owner += [len(segments) - 1] * own
        counts = len(segments), len(rotated), len(owner)
        planes = max([table.planes for table in tables], default=0)
        outputs = max([table.outputs for table in tables], default=0)
        if room:
            if max(counts) > room.rows or planes > room.planes or outputs > room.outputs:
                raise ValueError(f"no room for {counts} segments and rows, {planes} planes and {outputs} outputs")
            counts, planes, outputs = (room.rows,) * 3, room.planes, room.outputs
        self.segments, self.x_count, self.count = counts
        self.planes, self.outputs = planes, outputs
        longest = max([segment[ROWS.value] for segment in segments], default=1)
        self.parts = max(LEAST_PARTS, 2 * FEW_ROWS) if room else max(LEAST_PARTS, triton.next_power_of_2(2 * longest))
        self.shape = FEW if self.parts <= 16 else MANY
        tiles = -(-self.planes // self.shape[0]) * self.segments
        self.splits = max(1, min(MOST_SPLITS, PROGRAMS // tiles)) if tiles else 1
        # Of each row of x: whether it is rotated, and which it is; of each row of a delta: which of these it is, whose
        # it is, and which of y. What a fixed size leaves empty is a segment without a delta, and rows of it.
        lengths = [self.segments * SEGMENT.value, self.x_count, self.count, self.count, self.x_count, self.count]
        lengths = [-(-length // 2) * 2 for length in lengths]  # whole 16 bytes
        edges = [0, *accumulate(lengths)]
        host = np.zeros(edges[-1], np.int64)
        host[edges[3] : edges[4]] = self.segments - 1 if len(segments) < self.segments else 0
        for edge, values in zip(edges, ([*chain(*segments)], rotated, x_of, owner), strict=False):
            host[edge : edge + len(values)] = values
        made = torch.from_numpy(host).to(device)
        for edge, parts in ((edges[4], x_rows), (edges[5], y_rows)):
            if parts:
                numbers = torch.cat(parts)
                made[edge : edge + len(numbers)] = numbers
        if getattr(self, "table", None) is None:
            self.table = made
        else:
            self.table.copy_(made)
        self.of_segments, self.x_rotated, self.x_of, self.owner, self.x_row, self.y_row = (
            self.table[start:end] for start, end in pairwise(edges)
        )

    def compute(self, x: Tensor) -> Tensor:
        """The outputs of all rows, before they are rotated back: (rows, outputs)."""
        device, n, planes, count = x.device, self.n, max(self.planes, UNIT), self.count
        x = x if x.stride(1) == 1 else x.contiguous()
        length = -(-n // SIDE.value) * SIDE.value

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        # `_products` reads a step beyond the last row.
        inputs, input_scale = empty(self.x_count * 2 * length + STEP, dtype=torch.int8), empty(self.x_count)
        input_sum = empty(self.x_count, dtype=torch.int32)
        sums = empty(self.splits, count, 2, planes, dtype=torch.int32)
        values, parts = empty(count, planes), empty(count * 2 * planes + STEP, dtype=torch.int8)
        part_scale, part_sum = empty(count, len(WIDTHS)), empty(count, len(WIDTHS), dtype=torch.int32)
        product = empty(count, self.outputs)
        columns, step, warps = self.shape
        blocks = max(16, triton.next_power_of_2(length // SIDE.value))
        _prepare[(self.x_count,)](
            x, x.stride(0), self.x_row, self.x_rotated, signs_of(n, device), _turns(n, device),
            inputs, input_scale, input_sum, n, length, blocks, num_warps=8 if blocks <= 64 else 16,
        )  # fmt: skip
        if self.planes:
            _inner[(-(-self.planes // columns), self.segments, self.splits)](
                self.of_segments, inputs, sums, length // UNIT, planes // UNIT, count, self.splits, columns, step,
                self.parts, num_warps=warps,
            )  # fmt: skip
            _scale[(count,)](
                self.of_segments, self.owner, self.x_of, input_scale, input_sum, sums, values, parts, part_scale,
                part_sum, product, planes, self.outputs, count, self.splits, num_warps=4,
            )  # fmt: skip
        if self.outputs:
            _outer[(-(-self.outputs // columns), self.segments)](
                self.of_segments, parts, part_scale, part_sum, product, planes // UNIT, self.outputs, columns, step,
                self.parts, num_warps=warps,
            )  # fmt: skip
        return product

    def finish(self, y: Tensor, product: Tensor, start: int = 0, end: int | None = None) -> None:
        """Rotate the outputs of rows from `start` to `end` back and add them to y."""
        count = (self.count if end is None else end) - start
        if count and self.outputs:
            _finish[(-(-self.outputs // (16 * SIDE.value)), count)](
                self.of_segments, self.owner, self.y_row, product, start, self.outputs, y, y.stride(0), num_warps=8,
            )  # fmt: skip


@cache
def _turns(n: int, device: torch.device) -> Tensor:
    """The Hadamard matrices of the blocks of n entries, for all but the last one and for that: (2, BLOCK + 1, BLOCK).

    Of a matrix the entries, which are 1, -1 and 0, and in a last row the logarithms (base 2) of its columns' squares.
    """
    size = BLOCK
    found = torch.zeros(2, size + 1, size)
    for turn, sizes in zip(found, ([size], powers_of(n % size) or [size]), strict=True):
        first = 0
        for own in sizes:
            turn[first : first + own, first : first + own] = hadamard(own).sign()
            turn[size, first : first + own] = own.bit_length() - 1
            first += own
    return found.to(device, torch.float16)


@triton.jit
def _turned(x, turns, block, last, has_rest: tl.constexpr, is_exact: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of entries (blocks, SIDE), by their numbers, through their Hadamard matrices.

    is_exact: 11 bits of a mantissa are all that x has.
    """
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power > 0, power, 1.0)
    x = x / power  # is in range of half precision, and what is lost there is small beside the largest
    y = _times(x, turns, is_exact)
    if has_rest:
        rest = _times(x, turns + (SIDE + 1) * SIDE, is_exact)
        y = tl.where((block == last)[:, None], rest, y)
    return y * power


@triton.jit
def _times(x, turn, is_exact: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIDE)
    matrix = tl.load(turn + i[:, None] * SIDE + i[None])
    head = x.to(tl.float16)
    y = tl.dot(head, matrix)
    if not is_exact:
        y = tl.dot((x - head.to(tl.float32)).to(tl.float16), matrix, y)
    return y * tl.exp2(-0.5 * tl.load(turn + SIDE * SIDE + i).to(tl.float32))[None]


@triton.jit
def _in_parts(value, largest):  # type: ignore[no-untyped-def]
    """Integers of a value, and their two parts of 8 bits; `largest` is that of all values."""
    inverse = tl.where(largest > 0, LARGEST / largest, 0.0)
    number = tl.floor(value * inverse + 0.5).to(tl.int32)
    high = (number + 64) >> 7
    return number, high, number - high * 128


@triton.jit
def _of(delta, number):  # type: ignore[no-untyped-def]
    """A number of a delta's table; 0 where there is no delta."""
    return tl.load(delta + number, mask=delta.to(tl.int64) != 0, other=0)


@triton.jit(do_not_specialize=["n", "length"])
def _prepare(  # type: ignore[no-untyped-def]
    x, stride, rows, rotated, signs, turns, out, scales, sums, n, length, blocks: tl.constexpr
):
    """A row of x, rotated or not, in two parts of `length` bytes with zeros behind the n numbers."""
    i = tl.program_id(0)
    block = tl.arange(0, blocks)
    place = block[:, None] * SIDE + tl.arange(0, SIDE)[None]
    value = tl.load(x + tl.load(rows + i) * stride + place, mask=place < n, other=0.0)
    is_exact: tl.constexpr = value.dtype != tl.float32
    value = value.to(tl.float32)
    if tl.load(rotated + i) != 0:
        value *= tl.load(signs + place, mask=place < n, other=0.0)
        if n % SIDE == 0:
            value = _turned(value, turns, block, n // SIDE, False, is_exact)
        else:
            value = _turned(value, turns, block, n // SIDE, True, is_exact)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    number, high, low = _in_parts(value, largest)
    target = out + i.to(tl.int64) * 2 * length + place
    tl.store(target, high.to(tl.int8), mask=place < length)
    tl.store(target + length, low.to(tl.int8), mask=place < length)
    # No number where one of the row's is none, or infinite: then 0 times it is none.
    bad = tl.sum(tl.sum(value * 0.0, axis=1), axis=0)
    tl.store(scales + i, largest / LARGEST + bad)
    tl.store(sums + i, tl.sum(tl.sum(number, axis=1), axis=0))


@triton.jit
def _cut(bytes_, place: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes at a place of each half byte, times 2^(place width)."""
    mask: tl.constexpr = ((1 << width) - 1) << (place * width)
    if not HAS_PTX:
        cut = bytes_ & mask
    # Four at once: the compiler would cut them one by one.
    elif mask == 1:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x01010101;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 2:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x02020202;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 4:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x04040404;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 8:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x08080808;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 3:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x03030303;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 12:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0c0c0c0c;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    else:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    return cut


@triton.jit
def _upper_half(bytes_):  # type: ignore[no-untyped-def]
    """Bytes whose lower half is the upper half of these."""
    if not HAS_PTX:
        return bytes_ >> 4
    return tl.inline_asm_elementwise("shr.u32 $0, $1, 4;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    group, side: tl.constexpr, width: tl.constexpr, first, known, x, stride, parts_known, begin, end,
    columns: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """The integers `sum_k code[m, k] x[n, k]` of columns m from `first` on and parts n of rows: (columns, parts). There
    are `known` columns and `parts_known` parts.

    group: of a delta's table, with the codes' address at `side`. A column's codes are `units * 16` bytes, of which
    those from `begin` to `end` count, in steps. The codes at a place of all bytes go with numbers of x that lie
    together.
    """
    codes = (tl.load(group + side) * 16).to(tl.pointer_type(tl.int8))
    room = tl.load(group + side + 1).to(tl.int32) * 16
    places: tl.constexpr = 4 // width  # in half a byte
    k = tl.arange(0, step)
    m = tl.minimum(first + tl.arange(0, columns), first + known - 1)  # what comes of others is not used
    n = tl.minimum(tl.arange(0, parts), parts_known - 1)
    codes += m[:, None].to(tl.int64) * room + k[None]
    x += n[None] * stride + k[:, None]
    a0 = tl.zeros((columns, parts), tl.int32)
    a1 = tl.zeros((columns, parts), tl.int32)
    a2 = tl.zeros((columns, parts), tl.int32)
    a3 = tl.zeros((columns, parts), tl.int32)
    for at in range(begin * step, tl.minimum(end * step, room), step):
        # Behind a column's last byte the codes are zero, whatever number of x they are multiplied with.
        bytes_ = tl.load(codes + at, mask=(k < room - at)[None], other=0)
        for half in tl.static_range(2):
            own = _upper_half(bytes_) if half else bytes_
            source = x + (at + half * places * room)
            a0 = tl.dot(_cut(own, 0, width), tl.load(source), a0, out_dtype=tl.int32)
            if width < 4:
                a1 = tl.dot(_cut(own, 1, width), tl.load(source + room), a1, out_dtype=tl.int32)
            if width == 1:
                a2 = tl.dot(_cut(own, 2, width), tl.load(source + 2 * room), a2, out_dtype=tl.int32)
                a3 = tl.dot(_cut(own, 3, width), tl.load(source + 3 * room), a3, out_dtype=tl.int32)
    return a0 + (a1 >> width) + (a2 >> (2 * width)) + (a3 >> (3 * width))


@triton.jit(do_not_specialize=["length_units", "plane_units", "count", "splits"])
def _inner(  # type: ignore[no-untyped-def]
    segments, x, out, length_units, plane_units, count, splits, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    """Some of the planes of V times the parts of the rows of a segment, over a part of the inputs."""
    segment = segments + tl.program_id(1) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    first = tl.program_id(0) * columns
    split = tl.program_id(2)
    if first < _of(delta, PLANES):
        length, planes = length_units * SIDE, plane_units * SIDE
        parts_known = 2 * tl.load(segment + ROWS).to(tl.int32)
        own = x + tl.load(segment + X_FIRST) * 2 * length
        groups = delta + GROUPS
        if first < tl.load(groups + GROUP + START) * SIDE:
            total = _part_of_inner(groups, 4, first, own, length, parts_known, split, splits, columns, step, parts)
        elif first < tl.load(groups + 2 * GROUP + START) * SIDE:
            group = groups + GROUP
            total = _part_of_inner(group, 2, first, own, length, parts_known, split, splits, columns, step, parts)
        else:
            group = groups + 2 * GROUP
            total = _part_of_inner(group, 1, first, own, length, parts_known, split, splits, columns, step, parts)
        row = (split * count + tl.load(segment + FIRST)) * 2 + tl.arange(0, parts)
        target = out + row.to(tl.int64)[None] * planes + (first + tl.arange(0, columns))[:, None]
        tl.store(target, total, mask=(tl.arange(0, parts) < parts_known)[None])


@triton.jit
def _part_of_inner(  # type: ignore[no-untyped-def]
    group, width: tl.constexpr, first, x, length, parts_known, split, splits, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    start = tl.load(group + START).to(tl.int32) * SIDE
    known = tl.load(group + COUNT).to(tl.int32) - (first - start)
    steps = tl.cdiv(tl.load(group + V_UNITS).to(tl.int32) * 16, step)
    steps = tl.where(known > 0, steps, 0)
    begin, end = steps * split // splits, steps * (split + 1) // splits
    return _products(group, V, width, first - start, known, x, length, parts_known, begin, end, columns, step, parts)


@triton.jit(do_not_specialize=["planes", "outputs", "count", "splits"])
def _scale(  # type: ignore[no-untyped-def]
    segments, owner, x_of, x_scale, x_sum, sums, values, parts, scales, part_sums, product, planes, outputs, count,
    splits,
):  # fmt: skip
    """Of a row the sums of each component's planes, scaled, and for each plane again in parts."""
    i = tl.program_id(0).to(tl.int64)
    segment = segments + tl.load(owner + i) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    own_planes = _of(delta, PLANES).to(tl.int32)
    if own_planes == 0:
        return
    siblings = tl.load(delta + SIBLINGS).to(tl.pointer_type(tl.int32))
    sibling_count = tl.load(delta + SIBLING_COUNT).to(tl.int32)
    factors = tl.load(delta + FACTORS).to(tl.pointer_type(tl.float32))
    start2 = tl.load(delta + GROUPS + GROUP + START).to(tl.int32) * SIDE
    start1 = tl.load(delta + GROUPS + 2 * GROUP + START).to(tl.int32) * SIDE
    x_row = tl.load(x_of + i)
    own_scale, own_sum = tl.load(x_scale + x_row), tl.load(x_sum + x_row).to(tl.int64)
    is_sign = tl.load(delta + IS_SIGN) != 0
    most4 = 0.0
    most2 = 0.0
    most1 = 0.0
    for first in range(0, own_planes, CHUNK):
        place = first + tl.arange(0, CHUNK)
        inside = place < own_planes
        value = tl.zeros((CHUNK,), tl.float32)
        for s in range(sibling_count):
            at = tl.load(siblings + place * sibling_count + s, mask=inside, other=-1)
            known = at >= 0
            total = tl.zeros((CHUNK,), tl.int64)
            for split in range(splits):
                source = sums + (split * count + i) * 2 * planes + at
                total += tl.load(source, mask=known, other=0).to(tl.int64) * 256
                total += tl.load(source + planes, mask=known, other=0).to(tl.int64) * 2
            # Twice the product, since the middle of the codes is no integer.
            middle = tl.where(at < start2, 15, tl.where(at < start1, 3, 1)).to(tl.int64)
            weight = tl.load(factors + at, mask=known, other=0.0)
            value += weight * 0.5 * (total - middle * own_sum).to(tl.float32)
        value *= own_scale * tl.load(factors + own_planes + place, mask=inside, other=0.0)
        if is_sign:
            tl.store(product + i * outputs + place, value, mask=place < tl.load(delta + OUTPUTS))
        else:
            tl.store(values + i * planes + place, value, mask=inside)
            size = tl.abs(value)
            most4 = tl.maximum(most4, tl.max(tl.where(place < start2, size, 0.0), axis=0))
            most2 = tl.maximum(most2, tl.max(tl.where((place >= start2) & (place < start1), size, 0.0), axis=0))
            most1 = tl.maximum(most1, tl.max(tl.where(place >= start1, size, 0.0), axis=0))
    if not is_sign:
        tl.debug_barrier()
        sum4 = 0
        sum2 = 0
        sum1 = 0
        for first in range(0, own_planes, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < own_planes
            value = tl.load(values + i * planes + place, mask=inside, other=0.0)
            most = tl.where(place < start2, most4, tl.where(place < start1, most2, most1))
            number, high, low = _in_parts(value, most)
            target = parts + i * 2 * planes + place
            tl.store(target, high.to(tl.int8), mask=inside)
            tl.store(target + planes, low.to(tl.int8), mask=inside)
            sum4 += tl.sum(tl.where(place < start2, number, 0), axis=0)
            sum2 += tl.sum(tl.where((place >= start2) & (place < start1), number, 0), axis=0)
            sum1 += tl.sum(tl.where(place >= start1, number, 0), axis=0)
        bad = own_scale * 0.0  # no number if the row's scale is none
        tl.store(scales + i * 3, most4 / LARGEST + bad)
        tl.store(scales + i * 3 + 1, most2 / LARGEST + bad)
        tl.store(scales + i * 3 + 2, most1 / LARGEST + bad)
        tl.store(part_sums + i * 3, sum4)
        tl.store(part_sums + i * 3 + 1, sum2)
        tl.store(part_sums + i * 3 + 2, sum1)


@triton.jit(do_not_specialize=["plane_units", "outputs"])
def _outer(  # type: ignore[no-untyped-def]
    segments, x, scales, sums, product, plane_units, outputs, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    """Some outputs of the rows of a segment: the scaled sums times all planes of U."""
    segment = segments + tl.program_id(1) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    first = tl.program_id(0) * columns
    known = _of(delta, OUTPUTS).to(tl.int32) - first
    if (known > 0) & (_of(delta, IS_SIGN) == 0):
        planes = plane_units * SIDE
        row, rows = tl.load(segment + FIRST), tl.load(segment + ROWS).to(tl.int32)
        own = x + row * 2 * planes
        groups = delta + GROUPS
        total = _part_of_outer(groups, 4, 0, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        group = groups + GROUP
        total += _part_of_outer(group, 2, 1, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        group += GROUP
        total += _part_of_outer(group, 1, 2, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        both = tl.sum(tl.reshape(total, (columns, parts // 2, 2)), axis=2)
        r, m = tl.arange(0, parts // 2), tl.arange(0, columns)
        target = product + (row + r)[None] * outputs + (first + m)[:, None]
        tl.store(target, both, mask=(r < rows)[None] & (m < known)[:, None])


@triton.jit
def _part_of_outer(  # type: ignore[no-untyped-def]
    group, width: tl.constexpr, number: tl.constexpr, first, known, x, planes, rows, scales, sums, row,
    columns: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """What a group's planes add, the two parts of a row by themselves."""
    steps = tl.cdiv(tl.load(group + U_UNITS).to(tl.int32) * 16, step)
    own = x + tl.load(group + START).to(tl.int32) * SIDE
    total = _products(group, U, width, first, known, own, planes, 2 * rows, 0, steps, columns, step, parts)
    n = tl.arange(0, parts)
    place = (row + n // 2) * 3 + number
    is_known = n < 2 * rows
    scale = tl.load(scales + place, mask=is_known, other=0.0)
    middle = ((1 << width) - 1) * 0.5 * tl.load(sums + place, mask=is_known, other=0).to(tl.float32)
    is_high = n % 2 == 0
    value = total.to(tl.float32) * tl.where(is_high, 128.0, 1.0)[None] - tl.where(is_high, middle, 0.0)[None]
    return value * scale[None]


@triton.jit(do_not_specialize=["start", "outputs"])
def _finish(segments, owner, rows, product, start, outputs, y, stride):  # type: ignore[no-untyped-def]
    """Some outputs of a row rotated back, and added to y."""
    i = start + tl.program_id(1).to(tl.int64)
    segment = segments + tl.load(owner + i) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    own = _of(delta, OUTPUTS).to(tl.int32)
    first = tl.program_id(0) * 16
    if first * SIDE < own:
        block = first + tl.arange(0, 16)
        place = block[:, None] * SIDE + tl.arange(0, SIDE)[None]
        known = place < own
        value = tl.load(product + i * outputs + place, mask=known, other=0.0)
        turns = (tl.load(delta + TURNS) * 16).to(tl.pointer_type(tl.float16))
        if turns.to(tl.int64) != 0:
            signs = (tl.load(delta + SIGNS) * 16).to(tl.pointer_type(tl.float32))
            if own % SIDE == 0:
                value = _turned(value, turns, block, own // SIDE, False, False)
            else:
                value = _turned(value, turns, block, own // SIDE, True, False)
            value *= tl.load(signs + place, mask=known, other=0.0)
        numbers = tl.load(delta + NUMBERS).to(tl.pointer_type(tl.int32))
        target = place.to(tl.int64)
        if numbers.to(tl.int64) != 0:
            target = tl.load(numbers + place, mask=known, other=0).to(tl.int64)
        target = y + tl.load(rows + i) * stride + tl.load(segment + COLUMN) + target
        old = tl.load(target, mask=known, other=0.0)
        tl.store(target, (old.to(tl.float32) + value).to(old.dtype), mask=known)
