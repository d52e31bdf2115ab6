"""The plain kernel, in torch and float32: what the others are checked against, and what runs long prefills."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltacome.format.bits import planes
from deltacome.format.rotation import rotate, unrotate
from deltacome.runtime.kernels.packed import Packed


class Work:
    """What one matrix of a batch has to do.

    deltas: of shapes (m, n), n being the same, each with the numbers (int64) of its rows. firsts: of each the output
    that is its first, by default that of y. The deltas of one row and turn are for different
    outputs.
    """

    def __init__(self, deltas: Sequence[tuple[Packed, Tensor]], firsts: Sequence[int] | None = None) -> None:
        self.deltas = list(zip(deltas, firsts or [0] * len(deltas), strict=True))

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add to each row of y what its delta makes of the same row of x: `((x V) * scale) U^T`.

        y: (rows, m or more), changed in place. x: (rows, n).
        """
        for (packed, rows), first in self.deltas:
            product = multiply(x[rows].float(), packed).to(y.dtype)
            if packed.rows is None:
                y[rows, first : first + product.shape[1]] += product
            else:
                y[rows[:, None], first + packed.rows.long()[None]] += product


def multiply(x: Tensor, packed: Packed) -> Tensor:
    """`x D^T` for x (rows, n) in float32: (rows, m), or (rows, len(packed.rows)) of a delta of some rows alone."""
    product = torch.zeros(x.shape[0], packed.factored_rows, device=x.device)
    inputs = rotate(x) if "v" in packed.rotated else x
    for term, (u, v) in zip(packed.terms, packed.entries(), strict=True):
        product += (inputs @ v.T * term.scale) @ u
    if "u" in packed.rotated:
        product = unrotate(product)
    for grouped in packed.grouped:
        u, v = grouped.vectors()
        product += (x @ v.T * grouped.scale.float()) @ u
    if packed.signs is not None:
        assert packed.sign_scale is not None
        product += (x @ take_signs(packed).T) * packed.sign_scale
    return product


def columns(packed: Packed, places: Tensor) -> Tensor:
    """Entries of U, without scales, at some places: (rank of all terms, len(places)) in float32."""
    found = []
    if packed.terms:
        codes = torch.zeros(packed.rank, len(places), dtype=torch.int32, device=places.device)
        for group in packed.groups:
            group.sum_by_component(group.u.codes(group.width, group.count, places), codes)
        middles = [torch.full((term.rank, 1), term.middle, device=places.device) for term in packed.terms]
        found.append(codes - torch.cat(middles))
    for grouped in packed.grouped:
        assert grouped.groups is not None
        codes = torch.zeros(grouped.rank, len(places), dtype=torch.int32, device=places.device)
        start = 0
        for first, width in planes(grouped.bits):
            codes |= _cut(grouped.u[:, start + places // (32 // width)], places, width) << first
            start += -(-packed.factored_rows * width // 32)
        of = places // grouped.groups.size
        found.append((codes - grouped.groups.u_zero[:, of].float()) * grouped.groups.u_scale[:, of].float())
    return torch.cat(found)


def take_signs(packed: Packed, rows: Tensor | None = None) -> Tensor:
    """+1 and -1 of a sign term, (rows, n), of all rows or some."""
    assert packed.signs is not None
    return packed.signs.codes(1, packed.shape[1], rows).T.float().mul_(2).sub_(1)


def _cut(words: Tensor, places: Tensor, width: int) -> Tensor:
    """From each column of words (rank, count) the codes of `width` bits at that place of the row."""
    shifts = (places % (32 // width) * width).to(torch.int32)
    return words >> shifts & (1 << width) - 1


class Slots:
    """Whose slot each row of a step is, for layers that have the deltas of tenants in numbered slots.

    of_rows: int64, (rows,), on the device and always there: the slot of each row, `count` for none. used: whether any
    row of the step has one.

    Args:
        count: of slots.
        rows: of a step at most.
    """

    def __init__(self, count: int, rows: int, device: torch.device) -> None:
        self.count, self.rows, self.device = count, rows, device
        self.of_rows = torch.full((rows,), count, device=device)
        self.used = False
        self._last: bytes | None = None

    def set(self, of_rows: np.ndarray) -> bool:
        """Begin a step of up to `rows` rows, given the slot of each, int64; says whether anything is new."""
        key = of_rows.tobytes()
        if key == self._last:
            return False
        self._last, self.used = key, bool((of_rows != self.count).any())
        whole = np.full(self.rows, self.count)
        whole[: len(of_rows)] = of_rows
        self.of_rows.copy_(to_device(whole, self.device))
        return True

    def forget(self) -> None:
        """What is in the slots changes: the next step is another than the last, whatever its rows."""
        self._last = None


class SlotWork:
    """What a layer does for the tenants of a step, in the way of a `Work` that lasts.

    Args:
        slots: of all layers.
        columns: of each of the layer's matrices, which share an input, the output of y that is its first.
        widths: how many outputs each has.
        inputs: n of all.
    """

    def __init__(self, slots: Slots, columns: Sequence[int], widths: Sequence[int], inputs: int) -> None:
        self.slots, self.columns, self.widths, self.inputs = slots, columns, widths, inputs
        self.blocks: dict[tuple[int, int], Packed] = {}  # by matrix and slot

    def refusal(self, index: int, blocks: Sequence[Packed]) -> str | None:
        """Why what a tenant changes in a matrix cannot be in a slot; None if it can."""
        if len(blocks) > 1:
            return "it is made on another delta; flatten it"
        if any(packed.shape != (self.widths[index], self.inputs) for packed in blocks):
            return f"its matrix is not {self.widths[index]} x {self.inputs}"
        return None

    def fill(self, index: int, slot: int, blocks: Sequence[Packed]) -> None:
        """Put what `refusal` has nothing against into a slot of a matrix, or nothing."""
        self.blocks.pop((index, slot), None)
        if blocks:
            self.blocks[index, slot] = blocks[0]
        self.slots.forget()

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `Work.add`, for the first rows of a step, or all."""
        of_rows = self.slots.of_rows[: len(x)]
        found = [(i, packed, (of_rows == slot).nonzero()[:, 0]) for (i, slot), packed in self.blocks.items()]
        found = [own for own in found if len(own[2])]
        Work([(packed, rows) for _, packed, rows in found], [self.columns[i] for i, *_ in found]).add(y, x)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on a GPU that nobody waits for; on the CPU the values themselves."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
