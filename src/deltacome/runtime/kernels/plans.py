"""What the GPU kernel's programs are given: a delta's table, made once, and the plan of a batch."""

from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from torch import Tensor

from deltacome.format.rotation import BLOCK, hadamard, powers_of, signs_of
from deltacome.runtime.kernels import programs
from deltacome.runtime.kernels.layout import GPU_WIDTHS
from deltacome.runtime.kernels.packed import Packed, for_gpu

MOST_ROWS = 32  # of a segment: a program multiplies all of them
MOST_INPUTS = 1 << 16  # which `programs.prepare` has in registers
PROGRAMS = 512  # that are enough for a GPU; with fewer, the sums of the first product are split
MOST_SPLITS = 8
FEW = (32, 128, 2)  # of the products with up to 8 rows a segment: columns and bytes at a time, and warps
MANY = (64, 64, 4)
STEP = 128  # bytes at a time at most
LEAST_PARTS = 16 if torch.version.hip else 8  # rows of a segment, twice, that matrix units take


def is_fast(packed: Packed) -> bool:
    """Whether the kernels compute the delta; else it is the plain one's."""
    has_one_kind = (packed.terms != ()) + (packed.signs is not None) == 1
    return has_one_kind and not packed.grouped and packed.shape[1] <= MOST_INPUTS


@dataclass(frozen=True, eq=False)
class Table:
    """What the kernels read of a delta.

    numbers: the table, int64. planes: how many places there are for planes, outputs: how many of the second product.
    owned: the tensors that addresses are of, besides the delta's own.
    """

    numbers: Tensor
    planes: int
    outputs: int
    owned: tuple[Any, ...]

    @classmethod
    def of(cls, packed: Packed) -> "Table":
        """The delta's, made the first time; it lives as long as the delta, addresses being in use."""
        return _tables.get(packed) or _tables.setdefault(packed, cls._make(packed))

    @classmethod
    def _make(cls, given: Packed) -> "Table":
        packed = for_gpu(given)
        device = given.device
        m, outputs = packed.shape[0], packed.factored_rows
        groups: list[list[int]] = []
        component, weight = [np.zeros(0, np.int64)], [np.zeros(0)]
        start = 0
        by_width = {group.width: group for group in packed.groups}
        for width in GPU_WIDTHS:
            group, count, sides = by_width.get(width), 0, [0, 0, 0, 0]
            if group is not None:
                count = group.count
                sides = [*_line(group.v), *_line(group.u)]
            elif packed.signs is not None and width == 1:
                count, sides = m, [*_line(packed.signs), 0, 0]
            groups.append([start // BLOCK, count, *sides])
            places = -(-count // BLOCK) * BLOCK  # so that no program has planes of two groups
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


_tables: WeakKeyDictionary[Packed, Table] = WeakKeyDictionary()


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


@dataclass(frozen=True)
class Plan:
    """The tables of a batch, int64, and their sizes.

    There are `slices`, each with `segments_room` segments, of which the first `segments_used` count, and `room` rows,
    of which the first `rows` count. Rows of x there are for each of `kinds` in the same way.

    segments: their table. owner: of a row its segment, and y_row: its row of y. x_row: of a row of x its row there, and
    x_rotated: whether it is rotated. n: of all matrices. planes, outputs: the most that a delta has; most have no more
    planes than `usual`. parts: twice the rows of a segment at most. asks: whether some rows of x may not be wanted.
    """

    segments: Tensor
    owner: Tensor
    y_row: Tensor
    x_row: Tensor
    x_rotated: Tensor
    segments_used: int
    segments_room: int
    slices: int
    rows: int
    room: int
    kinds: int
    x_rows: int
    x_room: int
    n: int
    planes: int
    usual: int
    outputs: int
    parts: int
    asks: bool = False

    def compute(self, x: Tensor) -> Tensor:
        """The outputs of all rows, before they are rotated back: (room * slices, outputs)."""
        device, n, planes, count = x.device, self.n, max(self.planes, BLOCK), self.room * self.slices
        x = x if x.stride(1) == 1 else x.contiguous()
        length = -(-n // BLOCK) * BLOCK
        columns, step, warps = FEW if self.parts <= 16 else MANY
        tiles, segments = -(-self.usual // columns), self.segments_used * self.slices
        splits = max(1, min(MOST_SPLITS, PROGRAMS // max(tiles * segments, 1)))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        # The products' programs read a step beyond the last row.
        x_count = self.x_room * self.kinds
        inputs, input_scale = empty(x_count * 2 * length + STEP, dtype=torch.int8), empty(x_count)
        input_sum = empty(x_count, dtype=torch.int32)
        sums = empty(splits, count, 2, planes, dtype=torch.int32)
        values, parts = empty(count, planes), empty(count * 2 * planes + STEP, dtype=torch.int8)
        part_scale, part_sum = empty(count, len(GPU_WIDTHS)), empty(count, len(GPU_WIDTHS), dtype=torch.int32)
        product = empty(count, self.outputs)
        blocks = max(16, triton.next_power_of_2(length // BLOCK))
        programs.prepare[(self.x_rows, self.kinds)](
            self.segments, self.owner, x, x.stride(0), self.x_row, self.x_rotated, signs_of(n, device),
            _turns(n, device), inputs, input_scale, input_sum, n, length, self.slices if self.asks else 0, self.room,
            self.x_room, blocks, num_warps=8 if blocks <= 64 else 16,
        )  # fmt: skip
        if self.planes:
            programs.inner[(tiles, segments, splits)](
                self.segments, self.segments_used, self.segments_room, inputs, sums, length // BLOCK, planes // BLOCK,
                count, splits, columns, step, self.parts, num_warps=warps,
            )  # fmt: skip
            programs.scale[(self.rows, self.slices)](
                self.segments, self.owner, input_scale, input_sum, sums, values, parts, part_scale, part_sum, product,
                planes, self.outputs, count, splits, self.room, num_warps=4,
            )  # fmt: skip
        if self.outputs:
            programs.outer[(-(-self.outputs // columns), segments)](
                self.segments, self.segments_used, self.segments_room, parts, part_scale, part_sum, product,
                planes // BLOCK, self.outputs, columns, step, self.parts, num_warps=warps,
            )  # fmt: skip
        return product

    def finish(self, y: Tensor, product: Tensor, start: int = 0, end: int | None = None) -> None:
        """Rotate the outputs of rows from `start` to `end` back and add them to y."""
        count = (self.rows if end is None else end) - start
        if count and self.outputs:
            programs.finish[(-(-self.outputs // (16 * BLOCK)), count, self.slices)](
                self.segments, self.owner, self.y_row, product, start, self.outputs, self.room, y, y.stride(0),
                num_warps=8,
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
