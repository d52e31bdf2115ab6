"""Rate-distortion: every singular vector gets the bit-width that its share of the error is worth, in a rotated basis.

`docs/methods.md` derives each step; `docs/experiments.md` has the measurements behind the constants.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from deltacome.compression.allocation import Spectrum, allocate, expected_error
from deltacome.compression.methods.method import MatrixDelta, Statistics
from deltacome.compression.methods.sketch import Rest, along_mean, flatness, noise, sketch
from deltacome.compression.quantizers import Quantized, feed_back_in_blocks, fit_scale, quantize_rows
from deltacome.compression.svd import Basis, find_basis, split_components
from deltacome.format.entries import MOST_CLASSES, class_bits
from deltacome.format.rotation import rotate, rotated_diagonal
from deltacome.format.terms import Factored, Term, component_bits, sketch_bits

MOST_OF_SHARE = 2.0  # of its share of the bits that a linear hardly gets: what it takes is decomposed again
FLAT = 0.25  # of `flatness`: AdamW's linear weights have .01 to .25, but for tiny updates; Muon's up to .76
MEAN_BITS = 4  # of a component that makes good what a sketch errs by along the mean input
SKETCHED = (1 / 4, 1 / 2, 3 / 4, 1)  # of a matrix's bits, of which the best share is taken
TALL = 6  # times as many rows as columns has an embedding whose rows are put into classes


@dataclass(frozen=True)
class _Block:
    """Rows of a matrix that are coded together.

    shape: (rows, n). rows: which these are, ascending, None for all. fixed_bits: what it takes to say so.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    fixed_bits: int = 0


@dataclass(frozen=True)
class Decomposed:
    """A block of a matrix as its first components in the metric of the inputs.

    u: (rank, rows). s: (rank,). v: (rank, n), not of unit length. rest: the singular values of the other components.
    """

    block: _Block
    u: Tensor
    s: Tensor
    v: Tensor
    rest: Tensor


@dataclass(frozen=True)
class RateDistortion:
    """Components with bit-widths by a Lagrange multiplier, unbiased, in the metric of the layer's inputs.

    drop_weight: what the error of a dropped component weighs for each layer of the model at 1/4 bit a weight, against
        that of a coded one. Dropping is bias, which adds up over layers; the error of a code is noise, which averages
        out. With more bits there is less bias left than noise, so it weighs less, but never less than noise.
    bias_power: how fast that weight falls as the bits a weight grow.
    input_weight: share of the inputs' energies in the metric, the rest being the identity.
    sensitivity_power: what the sensitivity of a linear weight counts in sharing out. Noise costs in proportion to it,
        dropping less so.
    row_classes: of an embedding's rows, the most changed ones first: the shares of them where each class begins and the
        last one ends.
    rotate: code rotated vectors.
    feedback: let each entry of V make good the errors of those before it, in the metric of the inputs.
    restore: how much of what the dropped components would have added along the kept ones is given to these.
    flat_weight: how much more dropping weighs, against a sketch of what is dropped, where the spectrum is flat: what is
        dropped there is as much of what was learned as what is kept. Where it is not, nothing is sketched.
    """

    drop_weight: float = 4 / 15  # 8 for the 30 layers that it was chosen on
    bias_power: float = 0.3  # 8 of 30 layers at 1/64 of the bytes, 6.5 at 1/32
    input_weight: float = 0.5
    sensitivity_power: float = 0.25
    row_classes: tuple[float, ...] = (0, 1 / 8, 1 / 4, 1 / 2, 1)
    rotate: bool = True
    feedback: bool = True
    restore: float = 1.0
    flat_weight: float = 30.0

    spends_a_budget: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False

    @property
    def statistics(self) -> Statistics:
        return "energies" if self.input_weight else "nothing"

    def spectra(self, delta: MatrixDelta) -> tuple[list[Spectrum], tuple[Basis, ...]]:
        blocks = self._blocks(delta)
        share = None if delta.is_embedding else MOST_OF_SHARE * delta.bits_per_weight * delta.values.numel()
        bases = self._bases(delta, blocks, share)
        return [self.spectrum(delta, block, basis.s) for block, basis in zip(blocks, bases, strict=True)], bases

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        return self.quantize(delta, self.decompose(delta, budget_bits), budget_bits)

    def decompose(self, delta: MatrixDelta, budget_bits: float | None = None) -> list[Decomposed]:
        """The components of each block of rows, as many as `budget_bits` could hold; by default all."""
        root = self._energy(delta).sqrt()
        blocks = self._blocks(delta)
        found = []
        for block, basis in zip(blocks, self._bases(delta, blocks, budget_bits), strict=True):
            u, s, v, rest = split_components(_in_metric(delta, block, root), _most(block, budget_bits), basis)
            found.append(Decomposed(block, u, s, v / root, rest))
        return found

    def _bases(self, delta: MatrixDelta, blocks: list[_Block], budget_bits: float | None) -> tuple[Basis, ...]:
        """The blocks' bases: those that are known, or others where these are too short for `budget_bits`.

        In half precision, as they may lie on a disk meanwhile: far more exact than any code.
        """
        root = self._energy(delta).sqrt()
        bases = []
        for block, known in zip(blocks, delta.bases or [None] * len(blocks), strict=True):
            most = _most(block, budget_bits)
            if known is None or known.vectors.shape[1] < min(most, len(known.s)):
                found = find_basis(_in_metric(delta, block, root), most)
                known = Basis(found.s, found.vectors.half())
            bases.append(known)
        return tuple(bases)

    def quantize(self, delta: MatrixDelta, parts: list[Decomposed], budget_bits: float) -> list[Term]:
        """Terms that take `budget_bits` at most, all scales counted, of what `decompose` gave."""
        energy = self._energy(delta)
        spectra = [
            replace(self.spectrum(delta, part.block, part.s), v_squares=part.v.square().sum(1) * energy.mean())
            for part in parts
        ]
        steep = delta.is_embedding or flatness(delta.values) < FLAT
        terms: list[Term] = []
        for part, spectrum, widths in zip(parts, spectra, allocate(spectra, budget_bits), strict=True):
            sketched = 0
            if not steep:
                aside = 0 if delta.mean is None else component_bits(MEAN_BITS, *spectrum.shape)
                widths, sketched = self._sketched(part, spectrum, widths, budget_bits, aside)
            terms += self._code(delta, part, widths.to(energy.device), energy, sketched)
        return terms

    def _sketched(
        self, part: Decomposed, spectrum: Spectrum, widths: Tensor, budget_bits: float, aside: int
    ) -> tuple[Tensor, int]:
        """Bit-widths, and how many components of a sketch beside them: none, and the same, if that costs less.

        aside: bits that are kept for one more component where there is a sketch.
        """
        budget_bits, most = budget_bits - aside, min(spectrum.shape) - bool(aside)
        rest = float(part.rest.double().square().sum())
        plain = replace(spectrum, weight=1.0, drop_weight=spectrum.drop_weight * self.flat_weight)
        best = expected_error(plain, widths) + plain.drop_weight * rest
        found, each = (widths, 0), sketch_bits(*spectrum.shape)
        for share in SKETCHED:
            count = min(most, int(share * budget_bits / each))
            if count < 1:
                continue
            beside = replace(plain, drop_weight=noise(spectrum.shape, count))
            (own,) = allocate([beside], budget_bits - count * each)
            error = expected_error(beside, own) + beside.drop_weight * rest
            if error < best and count + int((own > 0).sum()) <= most:
                best, found = error, (own, count)
        return found

    def spectrum(self, delta: MatrixDelta, block: _Block, s: Tensor) -> Spectrum:
        """What sharing out needs to know of a block with these singular values."""
        weight = delta.sensitivity if delta.is_embedding else delta.sensitivity**self.sensitivity_power
        drop_weight = self.drop_weight * delta.layers * (4 * delta.bits_per_weight) ** -self.bias_power
        return Spectrum(block.shape, s, weight, max(1.0, drop_weight), fixed_bits=block.fixed_bits)

    def _code(self, delta: MatrixDelta, part: Decomposed, widths: Tensor, energy: Tensor, sketched: int) -> list[Term]:
        """The terms of a block whose components have these bit-widths, and of a sketch of so many components."""
        # From the highest bit-width to the lowest; within one the order of the singular values stays.
        order = widths.argsort(descending=True, stable=True)[: int((widths > 0).sum())]
        dropped = torch.cat((part.s[widths == 0], part.rest))
        u, s, v, bits = part.u[order], part.s[order], part.v[order], widths[order][:, None]
        rotated = ("v" if delta.is_embedding else "uv") if self.rotate else ""
        beside: list[Term] = []
        if sketched:
            beside.append(sketch(Rest(delta.values, u, s, v), sketched, rotated))
        elif not delta.is_embedding:
            s = s + self.restore * dropped.pow(3).sum() / s.square().sum()
        terms: list[Term] = []
        if len(order):
            u, v = (rotate(x) if side in rotated else x for side, x in (("u", u), ("v", v)))
            u_hat, v_hat = quantize_rows(u, bits), self._round_inputs(v, bits, energy)
            scale = s * fit_scale(u_hat.values, u, "unbiased") * u_hat.step
            scale *= fit_scale(v_hat.values, v, "unbiased") * v_hat.step
            for width in reversed(bits.unique().tolist()):
                own = bits[:, 0] == width
                codes = u_hat.codes[own], v_hat.codes[own], scale[own]
                terms.append(Factored.from_codes(width, *codes, rotated=rotated, rows=part.block.rows))
        if beside and delta.mean is not None:
            beside = [*along_mean(delta.values, delta.mean, [*terms, *beside], MEAN_BITS, rotated), *beside]
        return terms + beside

    def _blocks(self, delta: MatrixDelta) -> list[_Block]:
        """The whole matrix, or an embedding's rows in classes by the size of their change.

        A code has one step for all entries of a vector, so rows of one size are coded best; rows that change less can
        do with fewer components; and rows that don't change, as no token's of the data's, are to stay so.
        """
        values = delta.values
        m, n = values.shape
        sizes = values.norm(dim=1)  # with no copy of the whole, as their squares would be
        changed = int(sizes.count_nonzero())
        if not delta.is_embedding or (changed == m and m < TALL * n):
            return [_Block((m, n))]
        order = sizes.argsort(descending=True, stable=True)[:changed]
        starts = self.row_classes
        if changed < m and len(starts) > MOST_CLASSES:  # those that don't change are a class
            starts = starts[:1] + starts[2:]
        edges = [int(start * changed) for start in (starts if changed >= TALL * n else (0, 1))]
        classes = [order[first:last].sort().values.cpu() for first, last in pairwise(edges)]
        bits = m * class_bits(len(classes) + (changed < m))
        return [_Block((len(rows), n), rows, 0 if number else bits) for number, rows in enumerate(classes)]

    def _energy(self, delta: MatrixDelta) -> Tensor:
        """The energies of a delta's metric, (n,). An embedding's inputs are no vectors, so its metric is plain."""
        if delta.is_embedding or delta.energy is None or not bool(delta.energy.any()):
            return delta.values.new_ones(delta.values.shape[1])
        return 1 - self.input_weight + self.input_weight * delta.energy / delta.energy.mean()

    def _round_inputs(self, v: Tensor, bits: Tensor, energy: Tensor) -> Quantized:
        """Codes of V (rank, n); with feedback where the metric is not the identity.

        The metric of rotated inputs is that of their energies, so its inverse, that of the reciprocals, needs no
        inversion.
        """
        if not self.feedback or not self.rotate or bool((energy == energy[0]).all()):
            return quantize_rows(v, bits)
        factors = torch.linalg.cholesky(rotated_diagonal(energy.reciprocal()), upper=True)
        return feed_back_in_blocks(v, factors, bits)


def _in_metric(delta: MatrixDelta, block: _Block, root: Tensor) -> Tensor:
    """A block (rows, n) as it is decomposed: a copy, but not of a whole embedding, whose metric is plain."""
    values = delta.values if block.rows is None else delta.values[block.rows]
    return values if delta.is_embedding else values * root


def _most(block: _Block, budget_bits: float | None) -> int:
    """How many components of a block such a budget can hold, 1 at least."""
    shape = block.shape
    return min(shape) if budget_bits is None else max(1, min(*shape, int(budget_bits // component_bits(1, *shape))))
