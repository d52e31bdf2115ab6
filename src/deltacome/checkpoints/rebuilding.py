"""Fine-tuned weights and the files beside them, from an artifact and its base."""

from pathlib import Path

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.coding import decode, widened
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import Coded, Dense, Term, add_terms
from deltacome.weights import split_stack


def rebuild_stored(name: str, artifact: Artifact, base: Checkpoint, dtype: torch.dtype | None = None) -> Tensor:
    """A fine-tuned weight or stack of a name in `artifact.stored`; dtype: of those in floating point, else its own."""
    entries = artifact.stored[name]
    own = entries[0].dtype
    chosen = dtype if dtype is not None and own.is_floating_point else own
    parts = [rebuild(entry, artifact.terms(entry.name), base).to(chosen) for entry in entries]
    return parts[0] if split_stack(entries[0].name)[1] is None else torch.stack(parts)


def rebuild(entry: WeightEntry, terms: list[Term], base: Checkpoint) -> Tensor:
    """The fine-tuned weight: in its own dtype where it is exact, else in float32.

    Raises:
        DeltacomeError: if coded bits are damaged, or another base's.
    """
    if entry.dense == 0 or entry.base is None:
        value = next(term.value for term in terms if isinstance(term, Dense))
        return value.to(entry.dtype)  # a parent's own may differ
    if not terms:
        weight = base.read(entry.base).to(entry.dtype)
        return weight[: entry.shape[0]] if entry.shape else weight
    coded = next((term for term in terms if isinstance(term, Coded)), None)
    if coded is not None:
        return _decoded(entry, coded, terms, base)
    weight = base.read_float(entry.base)[: entry.shape[0]]
    rebuilt = torch.zeros(entry.shape)
    rebuilt[: weight.shape[0]] = weight
    return add_terms(rebuilt, terms)


def _decoded(entry: WeightEntry, coded: Coded, terms: list[Term], base: Checkpoint) -> Tensor:
    assert entry.base is not None
    try:
        weight = decode(coded.data, coded.dtype, base.read(entry.base)[: entry.coded_rows])
    except ValueError as error:
        raise DeltacomeError(
            f"the bits of {entry.name} cannot be rebuilt on {base.source}: {error}; fetch or compress the delta again"
        ) from error
    parts = [widened(weight, entry.dtype), *(term.value for term in terms if isinstance(term, Dense))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def sidecars(artifact: Artifact, base: Checkpoint) -> dict[str, Path]:
    """The files of the fine-tuned model beside its weights, by name."""
    return {name: path or base.folder / name for name, path in artifact.sidecars().items()}


def check_base(artifact: Artifact, base: Checkpoint) -> None:
    """Compare the base's weights and the files that the artifact takes from it.

    Raises:
        DeltacomeError: if it is another base.
    """
    if base.fingerprint() != artifact.fingerprint:
        raise DeltacomeError(
            f"{base.source} is not the base of {artifact.folder}: its weights' fingerprint differs; "
            f"the delta was made on {artifact.base_name}"
        )
    for name, path in artifact.sidecars().items():
        if path is None and base.sidecar_digest(name) != artifact.base_files[name]:
            raise DeltacomeError(f"{name} in {base.source} is not the one that {artifact.folder} was made with")


def check_shapes(artifact: Artifact, base: Checkpoint) -> None:
    """See that every weight that is not stored whole has a counterpart in the base that its terms can be added to.

    Raises:
        DeltacomeError: naming one that has none.
    """
    for name, entry in artifact.weights.items():
        if entry.base is None or entry.dense == 0:
            continue
        found = base.tensors.get(entry.base)
        if (
            found is None
            or len(found.shape) != len(entry.shape)
            or found.shape[1:] != entry.shape[1:]
            or (found.shape < entry.shape and not entry.tensors())
            or (entry.coded is not None and found.shape[0] < entry.coded_rows)
        ):
            raise DeltacomeError(
                f"{artifact.folder} is a broken artifact: {name} has the shape {list(entry.shape)}, which does not fit "
                f"{entry.base} in {base.source}; fetch or compress it again"
            )
