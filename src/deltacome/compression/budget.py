"""The bytes that a compression may spend, and how they are shared out over the matrices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from deltacome.checkpoints.pairing import Pair
from deltacome.compression.allocation import Spectrum, allocate, spent_bits
from deltacome.compression.methods import CodesBits, Method, SharesByError
from deltacome.errors import DeltacomeError, UnreachableRatioError
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import component_bits
from deltacome.weights import is_embedding

DEFAULT_RATIO = 16.0
RATIO_TOLERANCE = 0.01
TYPICAL_TERMS = ((8, 2), (4, 32), (3, 32), (2, 32), (1, 100))  # for the length of an entry
FIXED_METADATA = 1200  # bytes of the manifest and headers besides the weights' own
SHARINGS = 3  # what the metadata take depends on the outcome

Terms = Mapping[str, Sequence[tuple[int, int]]]  # (bits, rank) of the factored terms by matrix


def check_ratio(ratio: float) -> None:
    """Raise DeltacomeError if a ratio is no number that something could be compressed to."""
    if not 0 < ratio < math.inf:
        raise DeltacomeError(f"a ratio of {ratio:g} means nothing; give a number above 1, such as 16")


@dataclass(frozen=True)
class Budget:
    """What is asked of the size of an artifact.

    pairs: all weights by name. asked_ratio: None if the user leaves it open. exact_embeddings: embeddings and the head
    are stored as they are and left out of the ratio's sum.
    """

    method: Method
    pairs: Mapping[str, Pair]
    asked_ratio: float | None
    exact_embeddings: bool

    @property
    def ratio(self) -> float | None:
        """The artifact ratio to spend up to, None if the method fixes its own size."""
        return (self.asked_ratio or DEFAULT_RATIO) if self.method.spends_a_budget else None

    @cached_property
    def uncounted(self) -> frozenset[str]:
        """Names of the weights that the ratio is not about."""
        return frozenset(name for name in self.pairs if self.exact_embeddings and is_embedding(name))

    @cached_property
    def matrices(self) -> tuple[Pair, ...]:
        """The weights that the method compresses."""
        takes_all = isinstance(self.method, CodesBits)
        return tuple(p for p in self.pairs.values() if (takes_all or p.is_matrix) and p.name not in self.uncounted)

    @property
    def counted_elements(self) -> int:
        """Number of weights that the ratio is about."""
        return sum(torch.Size(p.shape).numel() for p in self.pairs.values() if p.name not in self.uncounted)

    def check_reachable(self, entries: Mapping[str, WeightEntry]) -> None:
        """See before the work whether the ratio can be met at all, with one component in one matrix.

        Args:
            entries: as `share_out` has them.

        Raises:
            UnreachableRatioError: if it cannot.
        """
        if self.ratio is not None and self.matrices:
            overhead = self._overhead(entries, {})
            if overhead + self._least_component > 2 * self.counted_elements / self.ratio:
                raise self._unreachable(overhead)

    def share_out(
        self, entries: Mapping[str, WeightEntry], spectra: Mapping[str, Sequence[Spectrum]]
    ) -> dict[str, float]:
        """Bits that each matrix may take, so that the whole artifact meets the ratio; empty if the method fixes them.

        Args:
            entries: of the weights that are finished, by name: all that are stored exactly are among them.
            spectra: by matrix; if there are any, the bits follow the errors of the matrices, else their sizes.

        Raises:
            UnreachableRatioError: if not one component can be paid for.
        """
        if self.ratio is None:
            return {}
        elements = sum(torch.Size(p.shape).numel() for p in self.matrices)
        overhead = self._overhead(entries, {p.name: TYPICAL_TERMS for p in self.matrices})
        allowed = 2 * self.counted_elements / self.ratio - overhead
        budgets = {p.name: 8 * allowed * torch.Size(p.shape).numel() / elements for p in self.matrices}
        flat = [spectrum for own in spectra.values() for spectrum in own]
        for _ in range(SHARINGS if spectra else 0):
            widths = iter(allocate(flat, 8 * allowed))
            budgets, terms = {}, {}
            for name, own in spectra.items():
                found = [next(widths) for _ in own]
                budgets[name] = sum(map(spent_bits, own, found))
                counts = [enumerate(each.bincount().tolist()) for each in found]
                terms[name] = [(bits, count) for each in counts for bits, count in each if bits and count]
            allowed = 2 * self.counted_elements / self.ratio - self._overhead(entries, terms)
        if not any(component_bits(1, *p.shape) <= budgets.get(p.name, 0) for p in self.matrices):
            raise self._unreachable(overhead)
        return budgets

    @property
    def _least_component(self) -> float:
        """Bytes of the cheapest component."""
        return min(component_bits(1, *p.shape) for p in self.matrices) / 8

    def _unreachable(self, overhead: float) -> UnreachableRatioError:
        most = 2 * self.counted_elements / (overhead + self._least_component)
        return UnreachableRatioError(
            f"a ratio of {self.ratio:g} cannot be reached: what is stored exactly and the metadata take "
            f"{overhead:,} bytes, and one component more; at most {most:.0f} could be"
        )

    def _overhead(self, entries: Mapping[str, WeightEntry], terms: Terms) -> int:
        """Bytes of all but the components, if the matrices have factored terms of these bits and ranks."""
        apart = self.uncounted | {p.name for p in self.matrices}
        overhead = FIXED_METADATA + sum(entry.bytes for name, entry in entries.items() if name not in apart)
        rotated = "uv" if isinstance(self.method, SharesByError) else ""
        group_size = getattr(self.method, "groups", 0)
        for p in self.matrices:
            factored = tuple(terms.get(p.name, ()))
            typical = WeightEntry(
                p.name, p.shape, p.dtype, p.base_name, factored, rotated=rotated, group_size=group_size, error=0.1234
            )
            overhead += typical.metadata_bytes + (p.shape[0] - p.rows) * p.shape[1] * p.dtype.itemsize
        return overhead

    def check(self, artifact: Artifact) -> None:
        """Compare a finished artifact with the ratio that was asked for.

        Raises:
            UnreachableRatioError: if it is larger.
        """
        counted = artifact.bytes - sum(artifact.entries[name].bytes for name in self.uncounted)
        reached = 2 * self.counted_elements / counted
        if self.asked_ratio is not None and reached < self.asked_ratio * (1 - RATIO_TOLERANCE):
            raise UnreachableRatioError(
                f"a ratio of {self.asked_ratio:g} cannot be reached with this method and plan: everything counted, "
                f"they come to {reached:.2f}; without --ratio the same command goes on from what is finished"
            )
