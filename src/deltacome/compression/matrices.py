"""The work on single matrices of a compression, wherever the checkpoints and the work folder can be seen."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import Pair
from deltacome.compression.allocation import spectra_tensors
from deltacome.compression.journal import Store
from deltacome.compression.methods import CodesBits, MatrixDelta, Method, SharesByError
from deltacome.compression.svd import Basis
from deltacome.device import CPU
from deltacome.format.entries import WeightEntry, term_tensors
from deltacome.format.terms import Dense, Term, add_terms
from deltacome.weights import is_embedding, module_kind

# What an error in an embedding costs to one in a linear weight, if it isn't measured; see docs/methods.md.
EMBEDDING_SENSITIVITY = 5.0


@dataclass(frozen=True)
class Matrices:
    """All that the work takes: what to read, how to compress, and where to put the results.

    store: for what is finished. shared: for what other ratios have a use for too. is_last: whether no other ratio
    comes after this one. pairs: by name, of these matrices and any other weights. layers, bits_per_weight: see
    `MatrixDelta`; layers by kind of matrix. device: where the arithmetic is done. inputs (energies and means, (2, n)),
    sensitivities, budgets (bits): by matrix, empty as long as they are not known.
    """

    base: Checkpoint
    finetuned: Checkpoint
    method: Method
    store: Store
    pairs: Mapping[str, Pair]
    layers: Mapping[str, int]
    bits_per_weight: float
    shared: Store
    is_last: bool = True
    device: torch.device = CPU
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)

    def measure(self, name: str) -> None:
        """Store what the method needs to know of a matrix for sharing out the bits, under `spectra of NAME`."""
        assert isinstance(self.method, SharesByError)
        delta = replace(self._known(name, None), bases=self._bases(name))
        spectra, bases = self.method.spectra(delta) if bool(delta.values.any()) else ([], ())
        if not delta.bases:
            kept = {f"{field}{i}": tensor for i, basis in enumerate(bases) for field, tensor in vars(basis).items()}
            self.shared.save_intermediate(f"bases of {name}", kept)
        self.store.save_intermediate(f"spectra of {name}", spectra_tensors(spectra))

    def compress(self, name: str, second_moment: Tensor | None = None) -> None:
        """Compress a matrix and store it."""
        p = self.pairs[name]
        if isinstance(self.method, CodesBits):
            base = None if p.base_name is None else self.base.read(p.base_name)
            if base is not None and p.shape:
                base = base[: p.rows]
            self.write(name, self.method.code(self.finetuned.read(name), base))
            return
        delta = self._known(name, second_moment)
        terms: list[Term] = []
        error = None
        norm = float(delta.values.norm())
        if norm:
            terms = self.method.compress(replace(delta, bases=self._bases(name)), self.budgets.get(name, 0))
            error = float(f"{float(add_terms(delta.values.neg_(), terms).norm()) / norm:.4g}")
        if p.rows < p.shape[0]:
            rest = self.finetuned.read(name)[p.rows :]
            if not self._has_rows(p, rest):
                terms.append(Dense(rest, p.rows))
        self.write(name, terms, error)
        if self.is_last:
            self.shared.drop_intermediate(f"bases of {name}")

    def _has_rows(self, p: Pair, rest: Tensor) -> bool:
        """Whether the base has these exact rows too, as what is rebuilt from a delta may."""
        if p.base_name is None or self.base.tensors[p.base_name].shape != p.shape:
            return False
        return torch.equal(rest, self.base.read(p.base_name)[p.rows :].to(rest.dtype))

    def write(self, name: str, terms: list[Term], error: float | None = None) -> None:
        """Store a weight's terms."""
        p = self.pairs[name]
        fields, tensors = term_tensors(terms, p.shape)
        entry = WeightEntry(name, p.shape, p.dtype, p.base_name, error=error, **fields)
        self.store.write(entry, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})

    def _known(self, name: str, second_moment: Tensor | None) -> MatrixDelta:
        """All that the method gets to know of a matrix but for its bases."""
        sensitivity, inputs = sensitivity_of(name, self.sensitivities), self.inputs.get(name)
        values, _ = read_delta(self.pairs[name], self.base, self.finetuned)
        values = values.to(self.device)
        energy, mean = (None, None) if inputs is None else inputs.to(self.device)
        layers, bits = self.layers[module_kind(name)], self.bits_per_weight
        return MatrixDelta(values, is_embedding(name), second_moment, energy, mean, sensitivity, layers, bits)

    def _bases(self, name: str) -> tuple[Basis, ...]:
        """A matrix's bases, as far as they have been found."""
        kept = self.shared.load_intermediate(f"bases of {name}") or {}
        kept = {key: tensor.to(self.device) for key, tensor in kept.items()}
        return tuple(Basis(kept[f"s{i}"], kept[f"vectors{i}"]) for i in range(len(kept) // 2))


def sensitivity_of(name: str, measured: Mapping[str, float]) -> float:
    """What an error in a matrix costs, see `MatrixDelta`."""
    return measured.get(name, EMBEDDING_SENSITIVITY if is_embedding(name) else 1.0)


def read_delta(p: Pair, base: Checkpoint, finetuned: Checkpoint) -> tuple[Tensor, float]:
    """The delta in float32, rows that the base lacks being zero, and the norm of the base's weight."""
    assert p.base_name is not None
    delta = finetuned.read_float(p.name)
    theirs = base.read_float(p.base_name)
    delta[: p.rows] -= theirs[: p.rows]
    delta[p.rows :] = 0
    return delta, float(theirs.norm())


def count_layers(names: Iterable[str]) -> Counter[str]:
    """In how many layers there is a matrix, by its kind; the experts of a layer count once."""
    return Counter(kind for kind, _ in {(module_kind(name), _layer(name)) for name in names})


def _layer(name: str) -> str:
    """A weight's name up to its layer's number, which comes before that of an expert."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""
