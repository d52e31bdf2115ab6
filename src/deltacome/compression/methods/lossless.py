"""Lossless: a fine-tuned weight's bits, coded by its base's."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltacome.compression.methods.method import Statistics
from deltacome.files import raw
from deltacome.format.coding import encode
from deltacome.format.entries import CODED_DTYPES
from deltacome.format.terms import Coded, Dense, Term


@dataclass(frozen=True)
class Lossless:
    """Every weight as it is to the last bit, in as few bytes as that takes."""

    spends_a_budget: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    statistics: ClassVar[Statistics] = "nothing"

    def code(self, value: Tensor, base: Tensor | None) -> list[Term]:
        if base is not None and _is_same(value, base.to(value.dtype)):
            return []
        if base is None or not base.ndim or not value.numel() or not base.is_floating_point():
            return [Dense(value)]
        shared, rest = value[: len(base)], value[len(base) :]
        if value.dtype not in CODED_DTYPES:
            return [Dense(value)]
        data, dtype = encode(shared, base)
        if data.nbytes >= shared.nbytes:
            return [Dense(value)]
        return [Coded(data, dtype), *([Dense(rest, len(base))] if len(rest) else [])]


def _is_same(value: Tensor, base: Tensor) -> bool:
    """Whether the bits are the same, NaN aside: nothing says what a conversion makes of its bits."""
    same_size = value.shape == base.shape
    return same_size and bool(raw(value) == raw(base)) and not (base.is_floating_point() and bool(base.isnan().any()))
