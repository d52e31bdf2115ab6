"""The GPU kernel: packed codes times a few rows, in integers, for all tenants and matrices that share an input.

Both factors of a product are integers: codes, and numbers in two parts of 8 bits, so a product is exact and runs on
int8 matrix units. Five launches, whatever the number of matrices, tenants and bit-widths: `prepare` rotates the inputs
and cuts them in parts, `inner` multiplies them with V's codes, `scale` makes of the sums the inputs of the second
product, in parts again, `outer` multiplies these with U's codes, and `finish` rotates back and adds (`programs`). What
they do lies in tables on the device: a delta's, made once, and a batch's, so a CUDA graph can be captured of them.
docs/gpu-kernel.md has the reasons, and what is known of their speed.
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
from torch import Tensor

from deltacome.format.rotation import BLOCK, hadamard, powers_of, signs_of
from deltacome.runtime.kernels import programs, reference
from deltacome.runtime.kernels.layout import GPU_WIDTHS
from deltacome.runtime.kernels.packed import Packed, for_gpu
from deltacome.runtime.kernels.reference import columns

__all__ = ["Room", "SharedWork", "Work", "columns", "planes_of"]

MOST_ROWS, FEW_ROWS = 32, 4  # of a segment, of any size and of a fixed one: a program multiplies all of them
MOST_INPUTS = 1 << 16  # which `programs.prepare` has in registers
PROGRAMS = 512  # that are enough for a GPU; with fewer, the sums of the first product are split
MOST_SPLITS = 8
FEW = (32, 128, 2)  # of the products with up to 8 rows a segment: columns and bytes at a time, and warps
MANY = (64, 64, 4)
STEP = 128  # bytes at a time at most
LEAST_PARTS = 16 if torch.version.hip else 8  # rows of a segment, twice, that matrix units take

Delta = tuple[Packed, Tensor]


class Work:
    """What some matrices of a batch that share an input have to do.

    Args:
        deltas: of shapes (m, n), n being the same, each with the numbers (int64) of its rows. Deltas of one row and
            turn are for different outputs.
        firsts: of each delta the output that is its first, by default that of y.
        room: of what `update` is to have room for; then all tables stay where they are.
    """

    def __init__(
        self, deltas: Sequence[Delta], firsts: Sequence[int] | None = None, room: "Room | None" = None
    ) -> None:
        self.room = room
        firsts = [0] * len(deltas) if firsts is None else firsts
        both = [(*delta, first) for delta, first in zip(deltas, firsts, strict=True) if len(delta[1])]
        turns: dict[int, list[tuple[Packed, Tensor, int]]] = {0: []}
        for delta in both:
            if _is_fast(delta[0]):
                turns.setdefault(delta[0].turn, []).append(delta)
        fast = turns.pop(0)
        self.fast = _Fast(fast, room) if fast or room else None
        self.later = [_Fast(own) for own in turns.values()]
        others = [(packed, rows, first) for packed, rows, first in both if not _is_fast(packed)]
        self.others = reference.Work([(packed, rows) for packed, rows, _ in others], [first for *_, first in others])

    def update(self, deltas: Sequence[Delta], firsts: Sequence[int] | None = None) -> None:
        """Do the same for other deltas from now on: a CUDA graph of `add` that was captured does so too.

        Raises:
            ValueError: if there is no room for them.
        """
        if self.room is None or not all(_is_fast(packed) and not packed.turn for packed, _ in deltas):
            raise ValueError("there is no room for other deltas")
        assert self.fast is not None
        self.fast.fill([(*delta, first) for delta, first in zip(deltas, firsts or [0] * len(deltas), strict=True)])

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        for fast in [*([] if self.fast is None else [self.fast]), *self.later]:
            fast.finish(y, fast.compute(x))
        self.others.add(y, x)


class SharedWork:
    """What several layers that share an input have to do, each with an output of its own.

    deltas: of each layer, as of `Work`. The first layer computes for all of them.
    """

    def __init__(self, deltas: Sequence[Sequence[Delta]]) -> None:
        fast = [[(*delta, 0) for delta in own if self._is_shared(delta[0])] for own in deltas]
        self.fast = _Fast(list(chain(*fast))) if any(fast) else None
        counts = [sum(len(rows) for _, rows, _ in own) for own in fast]
        self.edges = list(pairwise([0, *accumulate(counts)]))
        self.others = [Work([delta for delta in own if not self._is_shared(delta[0])]) for own in deltas]

    @staticmethod
    def _is_shared(packed: Packed) -> bool:
        return _is_fast(packed) and not packed.turn

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
    """How many planes a delta has, filled up as the kernels have them; a `Room` is to have as many."""
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
        self.table: Tensor | None = None
        self.fill(deltas)

    def fill(self, deltas: list[tuple[Packed, Tensor, int]]) -> None:
        """Make the tables, or fill those that are there."""
        room = self.room
        tables = [_Table.of(packed) for packed, _, _ in deltas]
        self.n = room.inputs if room else deltas[0][0].shape[1]
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
        sizes = len(segments), len(rotated), len(owner)
        planes = max([table.planes for table in tables], default=0)
        outputs = max([table.outputs for table in tables], default=0)
        if room:
            if max(sizes) > room.rows or planes > room.planes or outputs > room.outputs:
                raise ValueError(f"no room for {sizes} segments and rows, {planes} planes and {outputs} outputs")
            sizes, planes, outputs = (room.rows,) * 3, room.planes, room.outputs
        self.deltas = [packed for packed, _, _ in deltas]  # the tables have their addresses
        self.segments, self.x_count, self.count = sizes
        self.planes, self.outputs = planes, outputs
        longest = max([segment[programs.ROWS.value] for segment in segments], default=1)
        self.parts = max(LEAST_PARTS, 2 * FEW_ROWS) if room else max(LEAST_PARTS, triton.next_power_of_2(2 * longest))
        self.shape = FEW if self.parts <= 16 else MANY
        tiles = -(-self.planes // self.shape[0]) * self.segments
        self.splits = max(1, min(MOST_SPLITS, PROGRAMS // tiles)) if tiles else 1
        # Of each row of x: whether it is rotated, and which it is; of each row of a delta: which of these it is, whose
        # it is, and which of y. What a fixed size leaves empty is a segment without a delta, and rows of it.
        counts = self.segments * programs.SEGMENT.value, self.x_count, self.count, self.count, self.x_count, self.count
        lengths = [-(-length // 2) * 2 for length in counts]  # whole 16 bytes
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
        if self.table is None:
            self.table = made
        else:
            self.table.copy_(made)
        self.of_segments, self.x_rotated, self.x_of, self.owner, self.x_row, self.y_row = (
            self.table[start:end] for start, end in pairwise(edges)
        )

    def compute(self, x: Tensor) -> Tensor:
        """The outputs of all rows, before they are rotated back: (rows, outputs)."""
        device, n, planes, count = x.device, self.n, max(self.planes, BLOCK), self.count
        x = x if x.stride(1) == 1 else x.contiguous()
        length = -(-n // BLOCK) * BLOCK

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        # The products' programs read a step beyond the last row.
        inputs, input_scale = empty(self.x_count * 2 * length + STEP, dtype=torch.int8), empty(self.x_count)
        input_sum = empty(self.x_count, dtype=torch.int32)
        sums = empty(self.splits, count, 2, planes, dtype=torch.int32)
        values, parts = empty(count, planes), empty(count * 2 * planes + STEP, dtype=torch.int8)
        part_scale, part_sum = empty(count, len(GPU_WIDTHS)), empty(count, len(GPU_WIDTHS), dtype=torch.int32)
        product = empty(count, self.outputs)
        columns, step, warps = self.shape
        blocks = max(16, triton.next_power_of_2(length // BLOCK))
        programs.prepare[(self.x_count,)](
            x, x.stride(0), self.x_row, self.x_rotated, signs_of(n, device), _turns(n, device),
            inputs, input_scale, input_sum, n, length, blocks, num_warps=8 if blocks <= 64 else 16,
        )  # fmt: skip
        if self.planes:
            programs.inner[(-(-self.planes // columns), self.segments, self.splits)](
                self.of_segments, inputs, sums, length // BLOCK, planes // BLOCK, count, self.splits, columns, step,
                self.parts, num_warps=warps,
            )  # fmt: skip
            programs.scale[(count,)](
                self.of_segments, self.owner, self.x_of, input_scale, input_sum, sums, values, parts, part_scale,
                part_sum, product, planes, self.outputs, count, self.splits, num_warps=4,
            )  # fmt: skip
        if self.outputs:
            programs.outer[(-(-self.outputs // columns), self.segments)](
                self.of_segments, parts, part_scale, part_sum, product, planes // BLOCK, self.outputs, columns, step,
                self.parts, num_warps=warps,
            )  # fmt: skip
        return product

    def finish(self, y: Tensor, product: Tensor, start: int = 0, end: int | None = None) -> None:
        """Rotate the outputs of rows from `start` to `end` back and add them to y."""
        count = (self.count if end is None else end) - start
        if count and self.outputs:
            programs.finish[(-(-self.outputs // (16 * BLOCK)), count)](
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
