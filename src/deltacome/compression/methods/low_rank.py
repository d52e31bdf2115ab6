"""Truncated SVD with 16-bit vectors, the low-rank baseline of the paper."""

from dataclasses import dataclass
from typing import ClassVar

from deltacome.compression.methods.delta_come import DeltaCome
from deltacome.compression.methods.method import MatrixDelta, Statistics
from deltacome.format.terms import Term


@dataclass(frozen=True)
class LowRank:
    """As many leading components as the budget holds, in uniform 16-bit codes.

    A 16-bit code with one scale a vector is finer than bfloat16 or float16 factors of the same size, and needs no
    term of its own.
    """

    spends_a_budget: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    statistics: ClassVar[Statistics] = "nothing"

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        return DeltaCome(precision="16:*").compress(delta, budget_bits)
