"""Rate-distortion: every singular vector gets the bit-width that its share of the error is worth, in a rotated basis.

`docs/methods.md` derives each step; `docs/experiments.md` has the measurements behind the constants.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deltacome.compression.allocation import DISTORTION, Spectrum, allocate
from deltacome.compression.methods.method import MatrixDelta, Statistics
from deltacome.compression.quantizers import Quantized, feed_back_entries, fit_scale, quantize_rows
from deltacome.compression.svd import singular_values, split_components
from deltacome.format.bits import words_per_row
from deltacome.format.rotation import rotate
from deltacome.format.terms import Factored, Term, component_bits

SENSITIVITY_POWER = 0.5
BIAS_POWER = 0.3  # 8 of 30 layers at 1/64 of the bytes, 6.5 at 1/32
EMBEDDING_WEIGHT = 12.0  # KL of a unit of squared error in an embedding over that of one in another matrix
ROW_ENERGY = 0.99  # of an embedding's delta that the rows which are kept hold
ROWS_AT_ONCE = 1024
FEW_ROWS = 7 / 8  # of all rows; with more of them, all are kept


@dataclass(frozen=True)
class RateDistortion:
    """Components with bit-widths by a Lagrange multiplier, unbiased, in the metric of the layer's inputs.

    drop_weight: what the error of a dropped component weighs for each layer of the model at 1/4 bit a weight, against
        that of a coded one. Dropping is bias, which adds up over layers; the error of a code is noise, which averages
        out. With more bits there is less bias left than noise, so it weighs less, but never less than noise.
    input_weight: share of the inputs' energies in the metric, the rest being the identity.
    rotate: code rotated vectors.
    feedback: let each entry of V make good the errors of those before it, in the metric of the inputs.
    restore: how much of what the dropped components would have added along the kept ones is given to these.
    """

    drop_weight: float = 4 / 15  # 8 for the 30 layers that it was chosen on
    input_weight: float = 0.5
    rotate: bool = True
    feedback: bool = True
    restore: float = 1.0

    spends_a_budget: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False

    @property
    def statistics(self) -> Statistics:
        return "energies" if self.input_weight else "nothing"

    def spectrum(self, delta: MatrixDelta) -> Spectrum:
        values, energy, rows = self._prepare(delta)
        weighted = values if delta.is_embedding else values * energy.sqrt()
        return self._spectrum(delta, values, singular_values(weighted), rows is not None)

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        values, energy, rows = self._prepare(delta)
        root = energy.sqrt()
        most = max(1, min(int(budget_bits // component_bits(1, *values.shape)), *values.shape))
        # A copy of an embedding may not fit in memory; its metric is plain.
        u, s, v, rest = split_components(values if delta.is_embedding else values * root, most)
        v = v / root
        spectrum = self._spectrum(delta, values, s, rows is not None)
        spectrum = replace(spectrum, v_squares=v.square().sum(1) * energy.mean())
        widths = allocate([spectrum], budget_bits)[0].to(s.device)
        # From the highest bit-width to the lowest; within one the order of the singular values stays.
        order = widths.argsort(descending=True, stable=True)[: int((widths > 0).sum())]
        if not len(order):
            return []
        dropped = torch.cat((s[widths == 0], rest))
        u, s, v, bits = u[order], s[order], v[order], widths[order][:, None]
        if not delta.is_embedding:
            s = s + self.restore * dropped.pow(3).sum() / s.square().sum()
        rotated = ("v" if delta.is_embedding else "uv") if self.rotate else ""
        u, v = (rotate(x) if side in rotated else x for side, x in (("u", u), ("v", v)))
        u_hat, v_hat = quantize_rows(u, bits), self._round_inputs(v, bits, energy)
        scale = s * fit_scale(u_hat.values, u, "unbiased") * u_hat.step
        scale *= fit_scale(v_hat.values, v, "unbiased") * v_hat.step
        terms: list[Term] = []
        for width in sorted(DISTORTION, reverse=True):
            of_width = bits[:, 0] == width
            if of_width.any():
                codes = u_hat.codes[of_width], v_hat.codes[of_width]
                terms.append(Factored.from_codes(width, *codes, scale[of_width], rotated=rotated, rows=rows))
        return terms

    def _prepare(self, delta: MatrixDelta) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows of a delta that are coded, the energies of its metric (n,), and which rows these are, None for all.

        An embedding's delta is largely in the rows of few tokens. Its inputs are no vectors, so its metric is plain.
        """
        energy = delta.values.new_ones(delta.values.shape[1])
        if not delta.is_embedding:
            if delta.energy is not None and bool(delta.energy.any()):
                energy = 1 - self.input_weight + self.input_weight * delta.energy / delta.energy.mean()
            return delta.values, energy, None
        squares = delta.values.square().sum(1)
        order = squares.argsort(descending=True)
        share = squares[order].double().cumsum(0) / squares.double().sum()
        kept = int((share < ROW_ENERGY).sum()) + 1
        if kept > FEW_ROWS * len(order):
            return delta.values, energy, None
        rows = order[:kept].sort().values
        return delta.values[rows], energy, rows

    def _spectrum(self, delta: MatrixDelta, values: Tensor, s: Tensor, some_rows: bool) -> Spectrum:
        shape = values.shape[0], values.shape[1]
        weight = EMBEDDING_WEIGHT if delta.is_embedding else delta.sensitivity**SENSITIVITY_POWER
        drop_weight = self.drop_weight * delta.layers * (4 * delta.bits_per_weight) ** -BIAS_POWER
        bitmap = 32 * words_per_row(len(delta.values), 1) if some_rows else 0
        return Spectrum(shape, s, weight, max(1.0, drop_weight), fixed_bits=bitmap)

    def _round_inputs(self, v: Tensor, bits: Tensor, energy: Tensor) -> Quantized:
        """Codes of V (rank, n); with feedback where the metric is not the identity."""
        if not self.feedback or not self.rotate or bool((energy == energy[0]).all()):
            return quantize_rows(v, bits)
        return feed_back_entries(v, torch.linalg.cholesky(_rotated_diagonal(energy.reciprocal()), upper=True), bits)


def _rotated_diagonal(values: Tensor) -> Tensor:
    """R diag(values) RT, (n, n), in float32 and a few rows at a time: it may be larger than the matrix it is for.

    The metric of rotated inputs is that of their energies, so its inverse, that of the reciprocals, needs no inversion.
    """
    n = len(values)
    half, whole = values.new_empty(n, n), values.new_empty(n, n)
    for first in range(0, n, ROWS_AT_ONCE):
        own = values[first : first + ROWS_AT_ONCE]
        rows = values.new_zeros(len(own), n)
        rows[:, first : first + len(own)] = torch.diag(own)
        half[first : first + len(own)] = rotate(rows)
    for first in range(0, n, ROWS_AT_ONCE):
        whole[first : first + ROWS_AT_ONCE] = rotate(half[:, first : first + ROWS_AT_ONCE].T)
    return whole
