"""Precision plans: which components of a matrix get which bit-width."""

import re
from dataclasses import dataclass

from deltacome.errors import BadInputError, DeltacomeError
from deltacome.format.bits import BIT_WIDTHS
from deltacome.format.terms import component_bits

TRIPLE = "8:2,3:32,2:*"  # the paper's triple precision, "8+3+2"


@dataclass(frozen=True)
class PrecisionPlan:
    """Components in order of their singular values: (bit-width, how many), None for as many as the budget allows."""

    parts: tuple[tuple[int, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> "PrecisionPlan":
        """Parse `bits:count,...`, for example `8:2,3:32,2:*`; `*` may only be the last count.

        Raises:
            DeltacomeError: if the text is not a plan.
        """
        parts: list[tuple[int, int | None]] = []
        items = text.split(",")
        for place, item in enumerate(items):
            match = re.fullmatch(r"\s*(\d+):(\d+|\*)\s*", item)
            if match is None:
                raise DeltacomeError(
                    f"precision plan {text!r}: {item!r} is not BITS:COUNT; write it like {TRIPLE}, '*' meaning "
                    "as many as the budget allows"
                )
            bits = int(match[1])
            count = None if match[2] == "*" else int(match[2])
            if bits not in BIT_WIDTHS:
                raise DeltacomeError(f"precision plan {text!r}: {bits} bits is not offered; choose from {BIT_WIDTHS}")
            if count == 0:
                raise DeltacomeError(f"precision plan {text!r}: {item!r} asks for no components; leave it out")
            if count is None and place != len(items) - 1:
                raise DeltacomeError(f"precision plan {text!r}: '*' takes all that is left, so it can only come last")
            parts.append((bits, count))
        return cls(tuple(parts))

    def __str__(self) -> str:
        """The text that `parse` takes."""
        return ",".join(f"{bits}:{'*' if count is None else count}" for bits, count in self.parts)

    @property
    def spends_a_budget(self) -> bool:
        """Whether the plan ends in `*`; one that does not fixes the size by itself."""
        return self.parts[-1][1] is None

    def allocate(
        self, m: int, n: int, available: int, budget_bits: float, group_size: int = 0, count_scales: bool = True
    ) -> list[tuple[int, int]]:
        """(bit-width, rank) for one (m, n) matrix, spending `budget_bits` on components in order (paper, section 4).

        Args:
            available: how many components the delta has.
            budget_bits: bits the matrix may take; ignored by a plan without `*`.
            group_size: entries that share a scale; 0 for one scale a component.
            count_scales: False counts the vectors' entries alone, `bits * (m + n)`, as the paper does.

        Raises:
            DeltacomeError: if a plan without `*` asks for more components than there are.
        """
        asked = sum(count or 0 for _, count in self.parts)
        if not self.spends_a_budget and asked > min(m, n):
            raise BadInputError(
                f"the precision plan asks for {asked} components, and a matrix of {m} x {n} has {min(m, n)}; "
                "ask for fewer, or end the plan in '*'"
            )
        ranks = []
        for bits, count in self.parts:
            rank = available if count is None else min(count, available)
            if self.spends_a_budget:
                cost = component_bits(bits, m, n, group_size) if count_scales else bits * (m + n)
                rank = min(rank, int(budget_bits // cost))
                budget_bits -= rank * cost
            available -= rank
            if rank:
                ranks.append((bits, rank))
            if self.spends_a_budget and count is not None and rank < count:
                break  # the budget is spent in order: what is left buys no cheaper component
        return ranks
