"""The GPU kernel: packed codes times a few rows, in integers, for all tenants and matrices that share an input.

Both factors of a product are integers: codes, and numbers in two parts of 8 bits, so a product is exact and runs on
int8 matrix units. Five launches, whatever the number of matrices, tenants and bit-widths: `prepare` rotates the inputs
and cuts them in parts, `inner` multiplies them with V's codes, `scale` makes of the sums the inputs of the second
product, in parts again, `outer` multiplies these with U's codes, and `finish` rotates back and adds (`programs`). What
they do lies in tables on the device: a delta's, and a batch's (`plans`), which is made anew for each batch or, for a
CUDA graph, filled in place (`slots`). docs/gpu-kernel.md has the reasons, and what is known of their speed.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
import triton
from torch import Tensor

from deltacome.runtime.kernels import programs, reference
from deltacome.runtime.kernels.packed import Packed
from deltacome.runtime.kernels.plans import LEAST_PARTS, MOST_ROWS, Plan, Table, is_fast
from deltacome.runtime.kernels.reference import columns
from deltacome.runtime.kernels.slots import Slots, SlotWork

__all__ = ["SharedWork", "SlotWork", "Slots", "Work", "columns"]

Delta = tuple[Packed, Tensor]


class Work:
    """What some matrices of a batch that share an input have to do.

    Args:
        deltas: of shapes (m, n), n being the same, each with the numbers (int64) of its rows. Deltas of one row and
            turn are for different outputs.
        firsts: of each delta the output that is its first, by default that of y.
    """

    def __init__(self, deltas: Sequence[Delta], firsts: Sequence[int] | None = None) -> None:
        firsts = [0] * len(deltas) if firsts is None else firsts
        both = [(*delta, first) for delta, first in zip(deltas, firsts, strict=True) if len(delta[1])]
        turns: dict[int, list[tuple[Packed, Tensor, int]]] = {}
        for delta in both:
            if is_fast(delta[0]):
                turns.setdefault(delta[0].turn, []).append(delta)
        self.turns = [_Fast(turns[turn]) for turn in sorted(turns)]
        others = [(packed, rows, first) for packed, rows, first in both if not is_fast(packed)]
        self.others = reference.Work([(packed, rows) for packed, rows, _ in others], [first for *_, first in others])

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        for fast in self.turns:
            fast.plan.finish(y, fast.plan.compute(x))
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
        return is_fast(packed) and not packed.turn

    def compute(self, x: Tensor) -> Tensor | None:
        """What `finish` adds for each of the layers, while x stays as it is."""
        return None if self.fast is None else self.fast.plan.compute(x)

    def finish(self, layer: int, y: Tensor, x: Tensor, computed: Tensor | None) -> None:
        """As `reference.Work.add` for one of the layers."""
        start, end = self.edges[layer]
        if self.fast is not None and computed is not None and end > start:
            self.fast.plan.finish(y, computed, start, end)
        self.others[layer].add(y, x)


class _Fast:
    """Deltas that the kernels compute: packed, rows, first output."""

    def __init__(self, deltas: list[tuple[Packed, Tensor, int]]) -> None:
        tables = [Table.of(packed) for packed, _, _ in deltas]
        # Rows of x by whose they are and whether they are rotated: matrices with the same ones share them.
        inputs: dict[tuple[int, bool], int] = {}
        segments: list[list[int]] = []
        x_rows: list[Tensor] = []
        y_rows: list[Tensor] = []
        rotated: list[int] = []
        owner: list[int] = []
        for table, (packed, rows, column) in zip(tables, deltas, strict=True):
            count, key = len(rows), (id(rows), "v" in packed.rotated)
            if key not in inputs:
                inputs[key] = len(rotated)
                x_rows.append(rows)
                rotated += [key[1]] * count
            y_rows.append(rows)
            for first in range(0, count, MOST_ROWS):
                own = min(MOST_ROWS, count - first)
                segments.append([table.numbers.data_ptr(), inputs[key] + first, len(owner), own, column])
                owner += [len(segments) - 1] * own
        self.deltas = [packed for packed, _, _ in deltas]  # the tables have their addresses
        longest = max(segment[programs.ROWS.value] for segment in segments)
        device = deltas[0][1].device
        # Of each row of a delta whose it is, and which of y; of each row of x whether it is rotated, and which it is.
        lengths = [-(-length // 2) * 2 for length in (len(segments) * programs.SEGMENT.value, len(owner), len(rotated))]
        edges = [0, *accumulate(lengths)]  # in whole 16 bytes
        host = np.zeros(edges[-1], np.int64)
        for edge, values in zip(edges, ([*chain(*segments)], owner, rotated), strict=False):
            host[edge : edge + len(values)] = values
        made = torch.from_numpy(host).to(device)
        self.plan = Plan(
            segments=made[: edges[1]],
            owner=made[edges[1] : edges[2]],
            y_row=torch.cat(y_rows),
            x_row=torch.cat(x_rows),
            x_rotated=made[edges[2] :],
            segments_used=len(segments),
            segments_room=len(segments),
            slices=1,
            rows=len(owner),
            room=len(owner),
            kinds=1,
            x_rows=len(rotated),
            x_room=len(rotated),
            n=deltas[0][0].shape[1],
            planes=max(table.planes for table in tables),
            usual=max(table.planes for table in tables),
            outputs=max(table.outputs for table in tables),
            parts=max(LEAST_PARTS, triton.next_power_of_2(2 * longest)),
        )
