"""The GPU kernel for a CUDA graph: tenants in slots, and whose slot each row of a step is, in tables that never move.

A graph keeps the launches as they were captured, with their grids, sizes and addresses. So what changes from step to
step lies in tables on the device that are filled in place before the graph is replayed: once for all layers of a
model, and only when rows or tenants are not those of the last step. Sizes are the largest that may come; a program
that finds nothing for it in the tables ends at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacome.format.rotation import BLOCK
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.layout import GPU_WIDTHS
from deltacome.runtime.kernels.packed import Packed
from deltacome.runtime.kernels.plans import LEAST_PARTS, MOST_ROWS, Plan, Table, is_fast
from deltacome.runtime.kernels.programs import COLUMN, DELTA, FIRST, ROWS, SEGMENT, X_FIRST
from deltacome.runtime.kernels.reference import to_device

SIZES = ((4, 32), (MOST_ROWS, 1 << 16))  # rows of a segment, in batches of up to so many


class Slots(reference.Slots):
    """As the plain ones, with the tables that the programs read."""

    def __init__(self, count: int, rows: int, device: torch.device) -> None:
        super().__init__(count, rows, device)
        self.columns: list[int] = []  # of each slice of each layer the output that is its first,
        self.numbers: list[int] = []  # and which slice of its layer it is
        self.layouts: list[_Layout] = []
        self._tables = np.zeros((2, 0, count + 1), np.int64)

    def join(self, columns: Sequence[int]) -> int:
        """Take in a layer, by the first outputs of its slices; says which of all slices is its first.

        Raises:
            ValueError: after the first step.
        """
        if self.layouts:
            raise ValueError("a layer that joins after the first step")
        first = len(self.columns)
        self.columns += columns
        self.numbers += range(len(columns))
        self._tables = np.pad(self._tables, ((0, 0), (0, len(columns)), (0, 0)))
        return first

    def put(self, number: int, slot: int, packed: Packed | None) -> None:
        """Say where the table of a slice's delta lies, and whether it takes rotated inputs."""
        address = 0 if packed is None else Table.of(packed).numbers.data_ptr()
        self._tables[:, number, slot] = address, packed is not None and "v" in packed.rotated
        self.forget()

    def set(self, of_rows: np.ndarray) -> bool:
        if not super().set(of_rows):
            return False
        if not self.layouts:
            self.layouts = [_Layout.make(self, most, min(rows, self.rows)) for most, rows in SIZES]
        tables = to_device(self._tables, self.device)
        for layout in self.layouts:
            if len(of_rows) <= layout.rows:
                layout.fill(of_rows, tables)
        return True

    def layout(self, rows: int) -> "_Layout":
        """The tables for a batch of so many rows."""
        return next(layout for layout in self.layouts if rows <= layout.rows)


@dataclass(frozen=True)
class _Layout:
    """Tables for batches of up to `rows` rows, a segment having up to `most`; the last segment is always empty.

    step: in one tensor, so that one copy fills it: of each segment its slot, its first row and how many there are;
    then of each row, tenant by tenant, its segment, and its place in the batch. segments: (slices of all layers,
    segments, SEGMENT), as the programs read them. slices: of each which slice of its layer it is. owners, places:
    (slices of a layer, rows). is_rotated: (2, rows).
    """

    most: int
    rows: int
    step: Tensor
    segments: Tensor
    slices: Tensor
    owners: Tensor
    places: Tensor
    is_rotated: Tensor

    @classmethod
    def make(cls, slots: Slots, most: int, rows: int) -> "_Layout":
        device = slots.device
        # One more, which stays empty, and an even number: tables of layers begin at multiples of 16 bytes.
        segments, slices = min(rows, slots.count + rows // most) // 2 * 2 + 2, max(slots.numbers) + 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        table = zeros(len(slots.columns), segments, SEGMENT.value)
        table[..., COLUMN.value] = torch.tensor(slots.columns, device=device)[:, None]
        numbers = torch.tensor(slots.numbers, device=device)
        is_rotated = torch.tensor([[0], [1]], device=device).repeat(1, rows)
        step, owners, places = zeros(3 * segments + 2 * rows), zeros(slices, rows), zeros(max(slices, 2), rows)
        return cls(most, rows, step, table, numbers, owners, places, is_rotated)

    def fill(self, of_rows: np.ndarray, tables: Tensor) -> None:
        """Fill the tables for a step: of each row its slot, or none. tables: of each slice and slot, `Slots.put`'s."""
        segments, rows = self.segments.shape[1], self.rows
        none = tables.shape[2] - 1
        host = np.zeros(len(self.step), np.int64)
        slot, first, length = host[: 3 * segments].reshape(3, segments)
        owner, place = host[3 * segments :].reshape(2, rows)
        slot[:], owner[:] = none, segments - 1
        taken = segment = 0
        for number in np.unique(of_rows[of_rows != none]):
            own = np.flatnonzero(of_rows == number)
            place[taken : taken + len(own)] = own
            for start in range(taken, taken + len(own), self.most):
                end = min(start + self.most, taken + len(own))
                slot[segment], first[segment], length[segment] = number, start, end - start
                owner[start:end] = segment
                segment += 1
            taken += len(own)
        self.step.copy_(to_device(host, self.step.device))
        slots, firsts, lengths = self.step[: 3 * segments].view(3, segments)
        owners, places = self.step[3 * segments :].view(2, rows)
        addresses, rotated = tables.index_select(2, slots)
        self.segments[..., DELTA.value] = addresses
        self.segments[..., X_FIRST.value] = rotated * rows + firsts
        self.segments[..., FIRST.value] = self.slices[:, None] * rows + firsts
        self.segments[..., ROWS.value] = lengths * (addresses != 0)
        numbers = torch.arange(len(self.owners), device=owners.device)[:, None]
        self.owners.copy_(owners + numbers * segments)
        self.places.copy_(places.expand_as(self.places))


class SlotWork(reference.SlotWork):
    """As the plain one, by launches that a graph can have."""

    def __init__(self, slots: Slots, columns: Sequence[int], widths: Sequence[int], inputs: int) -> None:
        super().__init__(slots, columns, widths, inputs)
        self.tables = slots
        self.first = slots.join(columns)
        # A component has two planes at most; one bit a weight, 1/16, has `usual` of those of one bit.
        most = max(min(width, inputs) for width in widths)
        self.planes = _blocks(2 * most) + len(GPU_WIDTHS) * BLOCK
        self.usual = _blocks(max(width * inputs // (width + inputs) for width in widths))

    def refusal(self, index: int, blocks: Sequence[Packed]) -> str | None:
        found = super().refusal(index, blocks)
        if found is None and not all(is_fast(packed) for packed in blocks):
            return "it has terms that the GPU kernel does not compute"
        if found is None and any(packed.rank > min(packed.shape) for packed in blocks):
            return "it has more components than the matrix has rows or columns"
        return found

    def fill(self, index: int, slot: int, blocks: Sequence[Packed]) -> None:
        super().fill(index, slot, blocks)
        self.tables.put(self.first + index, slot, blocks[0] if blocks else None)

    def add(self, y: Tensor, x: Tensor) -> None:
        if self.slots.used:
            plan = self._plan(len(x))
            plan.finish(y, plan.compute(x))

    def _plan(self, rows: int) -> Plan:
        layout, slices = self.tables.layout(rows), len(self.widths)
        room = layout.segments.shape[1]
        return Plan(
            layout.segments[self.first : self.first + slices],
            layout.owners,
            layout.places,
            layout.places,
            layout.is_rotated,
            segments_used=min(rows, room),
            segments_room=room,
            slices=slices,
            rows=rows,
            room=layout.rows,
            kinds=2,
            x_rows=rows,
            x_room=layout.rows,
            n=self.inputs,
            planes=self.planes,
            usual=self.usual,
            outputs=max(self.widths),
            parts=max(LEAST_PARTS, 2 * layout.most),
            asks=True,
        )


def _blocks(planes: int) -> int:
    return -(-planes // BLOCK) * BLOCK
