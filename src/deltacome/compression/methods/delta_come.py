"""Delta-CoMe (Ping et al., NeurIPS 2024): mixed precision over the singular vectors of a delta."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.compression.methods.method import MatrixDelta, Statistics
from deltacome.compression.precision import TRIPLE, PrecisionPlan
from deltacome.compression.quantizers import (
    Quantized,
    Scale,
    fit_scale,
    quantize_entries_with_feedback,
    quantize_rows,
    quantize_vectors_with_feedback,
)
from deltacome.compression.svd import leading_components
from deltacome.errors import DeltacomeError
from deltacome.format.terms import Factored, Groups, Term

REFERENCE_GROUP = 128


@dataclass(frozen=True)
class DeltaCome:
    """Components in order of their singular values, with the bit-widths of a precision plan (paper, section 4).

    Without calibration the vectors are rounded to the nearest code; with it by GPTQ, V under the second moment H of
    the layer's inputs, then U under that of S V x, from the highest bit-width to the lowest.

    precision: a plan, see `PrecisionPlan.parse`.
    scale: what multiplies a vector's levels. `unbiased` and `least-squares` fit one factor a vector (see `fit_scale`);
        `minmax` takes the range of each group of entries, as the paper's reference code does.
    group_size: entries that share a range; 0 for one uniform code a vector. By default 128 for `minmax`, else 0.
    """

    precision: str = TRIPLE
    scale: Scale = "unbiased"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale not in ("unbiased", "least-squares", "minmax"):
            raise DeltacomeError(f"there is no scale {self.scale!r}; choose unbiased, least-squares or minmax")
        if self.groups < 0 or (self.scale == "minmax" and not self.groups):
            raise DeltacomeError(f"a group size of {self.groups} does not go with scale {self.scale}; try 128")
        PrecisionPlan.parse(self.precision)

    @property
    def groups(self) -> int:
        """Entries a group, 0 for none: `group_size`, or its default."""
        if self.group_size is None:
            return REFERENCE_GROUP if self.scale == "minmax" else 0
        return self.group_size

    @property
    def spends_a_budget(self) -> bool:
        return PrecisionPlan.parse(self.precision).spends_a_budget

    @property
    def needs_calibration(self) -> bool:
        return False

    @property
    def statistics(self) -> Statistics:
        return "second moments"

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        m, n = delta.values.shape
        second_moment = delta.second_moment
        plan = PrecisionPlan.parse(self.precision)
        rank = sum(count for _, count in plan.allocate(m, n, min(m, n), budget_bits, self.groups))
        u, s, v = leading_components(delta.values, rank)
        ranks = plan.allocate(m, n, len(s), budget_bits, self.groups)
        if not ranks:
            return []
        bits = torch.tensor([bits for bits, count in ranks for _ in range(count)], device=u.device)[:, None]
        if second_moment is None:
            v_hat, u_hat = quantize_rows(v, bits, self.groups), quantize_rows(u, bits, self.groups)
            v_factor = fit_scale(v_hat.values, v, self.scale)
        else:
            v_hat = quantize_entries_with_feedback(v, second_moment, bits, self.groups)
            v_factor = fit_scale(v_hat.values, v, self.scale)
            inner = v_hat.values * (v_factor * s)[:, None]  # U is multiplied with S V x
            u_hat = quantize_vectors_with_feedback(u, inner @ second_moment @ inner.T, bits, self.groups)
        scale = s * v_factor * v_hat.step * fit_scale(u_hat.values, u, self.scale) * u_hat.step
        return self._terms(ranks, u_hat, v_hat, scale)

    def _terms(self, ranks: list[tuple[int, int]], u: Quantized, v: Quantized, scale: Tensor) -> list[Term]:
        """One term a bit-width; `scale` (rank,) is the components'."""
        terms: list[Term] = []
        start = 0
        for bits, count in ranks:
            rows = slice(start, start + count)
            start += count
            groups = None
            if u.ranges is not None and v.ranges is not None:
                (u_scale, u_zero), (v_scale, v_zero) = (
                    (part.ranges.scale[rows].half(), part.ranges.zero[rows].byte()) for part in (u, v) if part.ranges
                )
                groups = Groups(self.groups, u_scale, u_zero, v_scale, v_zero)
            terms.append(Factored.from_codes(bits, u.codes[rows], v.codes[rows], scale[rows], groups))
        return terms
