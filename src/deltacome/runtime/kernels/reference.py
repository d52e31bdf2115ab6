"""The plain kernel, in torch and float32: what the others are checked against, and what runs long prefills."""

import torch
from torch import Tensor

from deltacome.format.bits import planes, unpack
from deltacome.format.rotation import rotate, unrotate
from deltacome.runtime.kernels.layout import COLUMNS
from deltacome.runtime.kernels.packed import Packed, take_apart


class Work:
    """What one matrix of a batch has to do.

    deltas: of shapes (m, n), n being the same, each with the numbers (int64) of its rows. The deltas of one row are for
    different rows of the weight.
    """

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        self.deltas = deltas

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add to each row of y what its delta makes of the same row of x: `((x V) * scale) U^T`.

        y: (rows, m or more), changed in place. x: (rows, n).
        """
        for packed, rows in self.deltas:
            product = multiply(x[rows].float(), packed).to(y.dtype)
            if packed.rows is None:
                y[rows, : product.shape[1]] += product
            else:
                y[rows[:, None], packed.rows.long()[None]] += product


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
        signs = take_signs(packed, packed.signs.matrix()[:, : packed.shape[0]])
        product += (x @ signs.T) * packed.sign_scale
    return product


def columns(packed: Packed, places: Tensor) -> Tensor:
    """Entries of U, without scales, at some places: (rank of all terms, len(places)) in float32."""
    found = []
    if packed.groups:
        codes = torch.zeros(packed.rank, len(places), dtype=torch.int32, device=places.device)
        for group in packed.groups:
            group.sum_by_component(take_apart(group.u.pick(places), group.width, group.count), codes)
        middles = [torch.full((term.rank, 1), term.middle, device=places.device) for term in packed.terms]
        found.append(codes - torch.cat(middles))
    else:
        for term in packed.terms:
            words = torch.cat([plane.u.pick(places) for plane in term.planes])
            found.append(unpack(words.T, term.bits, term.rank).T - term.middle)
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


def take_signs(packed: Packed, words: Tensor) -> Tensor:
    """+1 and -1, (columns, n), of some columns of the words of signs."""
    n = packed.shape[1]
    assert packed.signs is not None
    is_on_cpu = packed.signs.tile == COLUMNS
    codes = take_apart(words, 1, n).T if is_on_cpu else unpack(words.T.contiguous(), 1, n)
    return codes.float().mul_(2).sub_(1)


def _cut(words: Tensor, places: Tensor, width: int) -> Tensor:
    """From each column of words (rank, count) the codes of `width` bits at that place of the row."""
    shifts = (places % (32 // width) * width).to(torch.int32)
    return words >> shifts & (1 << width) - 1
