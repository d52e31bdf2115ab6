"""What a method is given, and what it gives."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from deltacome.compression.allocation import Spectrum
from deltacome.compression.svd import Basis
from deltacome.format.terms import Term

Statistics = Literal["nothing", "second moments", "energies"]


@dataclass(frozen=True)
class MatrixDelta:
    """One matrix to compress, and what is known of the layer's inputs x.

    values: float32, (m, n), at least one entry other than zero.
    is_embedding: whether it is an embedding or a language-model head, whose rows are tokens.
    second_moment: E[x xT], (n, n); None if it was not measured.
    energy: E[x²] of each input, (n,), scaled to a mean of 1; None if it was not measured.
    mean: E[x], (n,), in the same unit; None if it was not measured.
    layers: how many matrices of its kind the model has, one a layer.
    bits_per_weight: what the asked ratio leaves each weight of the model.
    sensitivity: what a unit of squared error in the weight costs in KL, to second order, against the geometric mean of
        the model's linear weights; 1 if it was not measured.
    bases: what `SharesByError.spectra` gave of it, perhaps for more bits, if that is at hand.
    """

    values: Tensor
    is_embedding: bool = False
    second_moment: Tensor | None = None
    energy: Tensor | None = None
    mean: Tensor | None = None
    sensitivity: float = 1.0
    layers: int = 1
    bits_per_weight: float = 1.0
    bases: tuple[Basis, ...] = ()


class Method(Protocol):
    """One method with its settings; a frozen dataclass whose fields are the settings.

    One of `CodesBits` has `code` in the place of `compress`.
    """

    @property
    def spends_a_budget(self) -> bool:
        """Whether the size follows the budget; otherwise the method fixes it."""
        ...

    @property
    def needs_calibration(self) -> bool:
        """Whether the method cannot do without the user's data."""
        ...

    @property
    def statistics(self) -> Statistics:
        """What of the layers' inputs the method makes use of. Energies are measured without data, too."""
        ...

    def compress(self, delta: MatrixDelta, budget_bits: float) -> list[Term]:
        """Terms of one delta that take `budget_bits` at most, all scales counted."""
        ...


@runtime_checkable
class CodesBits(Protocol):
    """What a method has if it takes every weight as it is stored, matrix or not."""

    def code(self, value: Tensor, base: Tensor | None) -> list[Term]:
        """Terms from which a weight is rebuilt to the last bit.

        Args:
            value: the fine-tuned weight in its own dtype.
            base: the base's rows of it, in the base's dtype; as many or fewer, None if it has no such weight.
        """
        ...


@runtime_checkable
class SharesByError(Protocol):
    """What a method has besides if the bits are to be shared out by the errors of all matrices.

    Without it every matrix gets the same bits a weight.
    """

    def spectra(self, delta: MatrixDelta) -> tuple[list[Spectrum], tuple[Basis, ...]]:
        """What sharing out needs to know of a matrix: one spectrum, or one for each class of its rows.

        And the decompositions behind them, the delta's own `bases` if it has any: neither `compress` nor the same for
        fewer bits need do them again.
        """
        ...
