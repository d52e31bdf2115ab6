"""A compressed delta in memory: what it changes in each module of the base model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ExpertSlot, ModuleNames
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import Dense, Factored, Term, add_terms
from deltacome.hub import UNFIT_FILES
from deltacome.runtime.kernels.packed import Packed, blocks_of, pack_blocks, transposed
from deltacome.runtime.kernels.reference import take_signs
from deltacome.weights import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS

# Settings of a model that change nothing in what it computes for a token, or are dealt with by what a delta holds.
WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "max_position_embeddings",
    "pretraining_tp",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


@dataclass
class Change:
    """What a delta changes in one module.

    packed: the factored and sign terms of the weight, those for different rows apart. rows: exact rows of the weight
    behind the base's (added tokens), or instead of all of them if `start` is 0. vectors: of each of an embedding's
    `packed` the vectors v with their scales, (rank, n) in float32, because a token takes all of them and of U a column.
    exact: other parameters by name.
    size: how many rows the weight has, if these are fewer than the base's (a smaller vocabulary).
    experts: of stacks, by parameter and expert: the first output that each packed part is added to, and the part.
    """

    packed: tuple[Packed, ...] = ()
    rows: Tensor | None = None
    start: int = 0
    vectors: tuple[Tensor, ...] = ()
    size: int | None = None
    exact: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[tuple[str, int], list[tuple[int, Packed]]] = field(default_factory=dict)

    def vocabulary(self, rows: int) -> int:
        """Tokens that the tenant has where this is an embedding of so many rows in the base."""
        if self.rows is not None:
            return self.start + len(self.rows)
        return rows if self.size is None else self.size

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps in memory."""
        for packed in self.packed:
            yield from packed.tensors()
        yield from self.vectors
        if self.rows is not None:
            yield self.rows
        yield from self.exact.values()
        for parts in self.experts.values():
            for _, packed in parts:
                yield from packed.tensors()


@dataclass(frozen=True, eq=False)
class Tenant:
    """A delta under its name, and its changes by the names of the base model's modules.

    ends: tokens that end an answer, by the fine-tuned model's configuration; empty for the base's.
    """

    name: str
    artifact: Artifact | None  # a benchmark's random deltas have none
    changes: Mapping[str, Change]
    ends: frozenset[int] = frozenset()

    @cached_property
    def deltas(self) -> dict[str, Packed | None]:
        """By module the delta of all rows of its weight; None where there are several, or one of some rows."""
        return {
            name: change.packed[0] if len(change.packed) == 1 and change.packed[0].rows is None else None
            for name, change in self.changes.items()
            if change.packed
        }

    @cached_property
    def exact(self) -> frozenset[str]:
        """Modules where more is changed than what `Change.packed` adds."""
        return frozenset(
            name
            for name, change in self.changes.items()
            if change.rows is not None or change.size is not None or change.exact or change.experts
        )

    @property
    def bytes(self) -> int:
        """Bytes that it takes in memory."""
        tensors = (tensor for change in self.changes.values() for tensor in change.tensors())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def load_tenant(name: str, artifact: Artifact, model: nn.Module, device: torch.device) -> Tenant:
    """Read an artifact, its digests and base checked already, for a model of its base.

    Raises:
        DeltacomeError: if it changes something that can only be merged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = ModuleNames(model)
    changes: dict[str, Change] = {}
    for entry, terms in artifact.all_terms():
        has_vocabulary = entry.name.endswith((*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS))
        if not terms and not has_vocabulary:
            continue
        expert = names.find_expert(entry.name)
        module_name, _, parameter = (expert.parameter if expert else names.find(entry.name)).rpartition(".")
        module = modules[module_name]
        if has_vocabulary and isinstance(module, nn.Linear | nn.Embedding) and entry.shape[0] < len(module.weight):
            changes.setdefault(module_name, Change()).size = entry.shape[0]
        if not terms:
            continue
        change = changes.setdefault(module_name, Change())
        if expert and not any(isinstance(term, Dense) for term in terms):
            _change_expert(change, expert, parameter, module, entry, terms, device)
        elif parameter == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            _change_weight(change, module, entry, terms, device)
        elif isinstance(terms[0], Dense) and terms[0].value.ndim == 1 and not list(module.children()):
            change.exact[parameter] = terms[0].value.to(device, copy=True)  # or the file stays mapped
        elif expert is None and len(entry.shape) == 2 and not list(module.children()) and entry.base is not None:
            # Small, and of modules that compute in their own way, such as routers.
            value = module.get_parameter(parameter)
            exact = add_terms(value.detach().to("cpu", torch.float32, copy=True), terms)
            change.exact[parameter] = exact.to(device, value.dtype)
        else:
            raise DeltacomeError(
                f"{artifact.folder} changes {entry.name}, which cannot be served beside the base; merge it instead"
            )
    _tie(artifact, model, modules, changes)
    return Tenant(name, artifact, changes)


def _change_weight(
    change: Change, module: nn.Module, entry: WeightEntry, terms: list[Term], device: torch.device
) -> None:
    shape = entry.shape
    if isinstance(module, Conv1D):
        terms, shape = transposed(terms), (shape[1], shape[0])
    for term in terms:
        if isinstance(term, Dense):
            change.rows, change.start = term.value.to(device, copy=True), term.start
    rest = [term for term in terms if not isinstance(term, Dense)]
    if rest:
        change.packed = pack_blocks(rest, (shape[0], shape[1]), device)
    if isinstance(module, nn.Embedding) and rest:
        change.vectors = tuple(vectors.to(device) for vectors in embedding_vectors(entry.name, rest))


def _change_expert(
    change: Change,
    expert: ExpertSlot,
    parameter: str,
    module: Any,
    entry: WeightEntry,
    terms: list[Term],
    device: torch.device,
) -> None:
    m, n = entry.shape
    if expert.is_slice and module.is_transposed:
        terms, (m, n) = transposed(terms), (n, m)
    stack = getattr(module, parameter)
    first = expert.half * stack.shape[2 if module.is_transposed else 1] // 2
    packed = pack_blocks(terms, (m, n), device)
    change.experts.setdefault((parameter, expert.expert), []).extend((first, block) for block in packed)


def embedding_vectors(name: str, terms: Sequence[Term]) -> tuple[Tensor, ...]:
    """`Change.vectors` of the terms of an embedding of that name: those of each block, nothing of a sign term.

    Raises:
        DeltacomeError: if rows of it cannot be looked up.
    """
    factored = [term for term in terms if isinstance(term, Factored)]
    if any("u" in term.rotated for term in factored):
        raise DeltacomeError(f"the rows of {name} are rotated, so that tokens cannot be looked up; merge it")
    return tuple(
        torch.cat([term.right_vectors() * term.scale.float()[:, None] for term in block])
        for block in blocks_of(factored)
    )


def check_config(artifact: Artifact, base: Checkpoint) -> None:
    """Compare how the fine-tuned model computes with how its base does, which computes for it.

    Raises:
        DeltacomeError: naming the first setting that differs; if the weights are coded without loss.
    """
    if any(entry.coded is not None for entry in artifact.entries.values()):
        raise DeltacomeError(
            f"{artifact.folder} holds weights to the last bit, which cannot be served beside the base; merge it, or "
            "compress without --lossless"
        )
    config = artifact.sidecars().get("config.json")
    if config is None:
        return
    from transformers import AutoConfig

    try:
        ours, theirs = (
            AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
            for folder in (base.folder, config.parent)
        )
    except UNFIT_FILES:  # a model that transformers does not know
        ours, theirs = base.config, json.loads(config.read_text())
    difference = next(_differences(ours, theirs), None)
    if difference is not None:
        name, values = difference
        raise DeltacomeError(
            f"{artifact.folder} cannot be served on {base.source}: {name} is {values[1]} in the fine-tuned model and "
            f"{values[0]} in the base, which computes for both; merge it instead"
        )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in sorted(ours.keys() & theirs.keys()):
        one, other = ours[key], theirs[key]
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other)
        elif one != other and not (key in WITHOUT_EFFECT or "dropout" in key or key.endswith("_token_id")):
            yield key, (one, other)


def _tie(artifact: Artifact, model: Any, modules: dict[str, nn.Module], changes: dict[str, Change]) -> None:
    """Where the fine-tuned model has no output embedding of its own, the input embedding's changes are also its."""
    names = {module: name for name, module in modules.items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or any(name.endswith(OUTPUT_EMBEDDINGS) for name in artifact.entries):
        return
    if head.weight is not embedding.weight:
        raise DeltacomeError(f"{artifact.folder} ties its embeddings and its base does not; merge it instead")
    if names[embedding] in changes:
        change = changes[names[embedding]]
        changes[names[head]] = Change(change.packed, change.rows, change.start, size=change.size)


def embed(change: Change, ids: Tensor, n: int, kernels: Any) -> Tensor:
    """What the delta adds to the embeddings of tokens: ids (count,), in range, to (count, n) in float32."""
    added = torch.zeros(len(ids), n, device=ids.device)
    vectors = iter(change.vectors)
    for packed in change.packed:
        if packed.signs is not None:
            assert packed.sign_scale is not None
            added += take_signs(packed, ids) * packed.sign_scale
            continue
        places, known = ids, None
        if packed.rows is not None:
            places = torch.searchsorted(packed.rows, ids.to(torch.int32)).clamp_(max=len(packed.rows) - 1)
            known = packed.rows[places] == ids
        columns = kernels.columns(packed, places)
        if known is not None:
            columns *= known
        added.addmm_(columns.T, next(vectors))
    return added
