"""BitDelta (Liu et al., 2024): the sign of each entry of a delta, times one scale a matrix."""

from dataclasses import dataclass
from typing import Literal

from deltacome.compression.methods.method import MatrixDelta, Statistics
from deltacome.errors import DeltacomeError
from deltacome.format.bits import pack
from deltacome.format.terms import Sign, Term


@dataclass(frozen=True)
class BitDelta:
    """`scale * sign(D)`, one bit a weight whatever the budget.

    scale: `mean` is mean |D|, which minimizes the error of the weights (BitDelta, equation 3). `refit` minimizes the
        error of the outputs, E |(D - scale S) x|^2, in closed form: tr(D H S^T) / tr(S H S^T), S = sign(D) and H the
        second moment of the inputs. It takes the place of BitDelta's distillation and needs calibration.
    """

    scale: Literal["mean", "refit"] = "mean"

    def __post_init__(self) -> None:
        if self.scale not in ("mean", "refit"):
            raise DeltacomeError(f"bitdelta has no scale {self.scale!r}; choose mean or refit")

    @property
    def spends_a_budget(self) -> bool:
        return False

    @property
    def needs_calibration(self) -> bool:
        return self.scale == "refit"

    @property
    def statistics(self) -> Statistics:
        return "second moments" if self.needs_calibration else "nothing"

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        values = delta.values
        positive = values >= 0
        scale = values.abs().mean()
        if self.scale == "refit" and delta.second_moment is not None:
            signs = positive.to(values.dtype).mul_(2).sub_(1)
            outputs = signs @ delta.second_moment.to(values.dtype)
            scale = (outputs * values).sum() / (outputs * signs).sum()
        return [Sign((values.shape[0], values.shape[1]), pack(positive, 1), scale.reshape(1))]
