"""A delta as vLLM's modules have it: read from its artifact, by the modules and the slices of their outputs."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import Dense, Term
from deltacome.runtime.kernels.packed import pack_blocks
from deltacome.runtime.tenant import check_config, embedding_vectors
from deltacome.vllm import internals
from deltacome.vllm.changes import Gains, Part, Values, share
from deltacome.vllm.experts import Experts
from deltacome.vllm.layers import Content, Embedding, Linear, Logits
from deltacome.vllm.norms import Norm
from deltacome.vllm.towers import PARAMETERS, Parameters, is_of_text
from deltacome.vllm.vocabulary import room_for
from deltacome.weights import OUTPUT_EMBEDDINGS, is_embedding, is_matrix

CPU = torch.device("cpu")


class Layers:
    """The layers of a vLLM model that take adapters, found by the names that a checkpoint has for their weights.

    packed: of layers that compute several matrices in one go, the names of those. towers: how the names of modules
    begin that see images. tower_refusal: how vLLM runs, if these cannot be changed so.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        packed: Mapping[str, list[str]],
        towers: tuple[str, ...] = (),
        tower_refusal: str | None = None,
    ) -> None:
        self.model, self.modules, self._towers, self._tower_refusal = model, modules, towers, tower_refusal
        self.slices = {name: (name, 0) for name in modules if name not in packed}
        for name, parts in packed.items():
            if getattr(modules[name], "n_slices", 0) == len(parts):
                self.slices |= {part: (name, index) for index, part in enumerate(parts)}
        missing = [name for name, module in model.named_modules() if isinstance(module, internals.PPMissingLayer)]
        self._elsewhere = tuple(f"{name}." for name in missing)

    def find(self, entry: WeightEntry) -> tuple[str, int, str] | None:
        """Module, slice of its outputs and parameter of a weight; None if it takes no part in what this GPU computes.

        Raises:
            DeltacomeError: if there is no such layer.
        """
        # vLLM has read the base, so it knows its names; a fine-tune may have been saved under newer ones.
        names = [entry.name] if entry.base is None or is_embedding(entry.name) else [entry.name, entry.base]
        own = [internals.rename(self.model, name) for name in names]
        if any(name.startswith(self._elsewhere) for name in own):
            return None
        found = next((found for found in map(self._find, own) if found is not None), None)
        is_of_tower = own[-1].startswith(self._towers)
        if is_of_tower and found is None and any(map(self._is_left_out, own)):
            return None
        if is_of_tower and self._tower_refusal is not None:
            raise DeltacomeError(
                f"{entry.name} is of the part of the model that sees images, and vLLM runs {self._tower_refusal}, "
                "where deltas cannot change that; start it without, or merge the delta"
            )
        # What images are told apart by has to know, see `languages`.
        if found is None or (is_of_tower and is_of_text(entry.name)):
            raise _refusal(entry.name)
        return found

    def _find(self, name: str) -> tuple[str, int, str] | None:
        module, _, parameter = name.rpartition(".")
        if module in self.slices and parameter in ("weight", "bias"):
            return (*self.slices[module], parameter)
        others: Any = self.modules.get(PARAMETERS)
        return (PARAMETERS, 0, name) if others is not None and name in others.parameters_of_base else None

    def _is_left_out(self, name: str) -> bool:
        """Whether it is behind the layer of a tower whose outputs the model uses: vLLM does without all that is."""
        first = re.sub(r"\.layers\.\d+\.", ".layers.0.", name)
        return ".post_layernorm." in name or (first != name and self._find(first) is not None)


def read(artifact: Artifact, base: Checkpoint, layers: Layers) -> dict[str, Content]:
    """The contents of a checked artifact for the modules of a vLLM model, on the CPU.

    Raises:
        DeltacomeError: if it changes what they cannot change.
    """
    check_config(artifact, base)
    parts: dict[str, dict[int, Part]] = {}
    norms: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for entry, terms in artifact.all_terms():
        in_base = base.tensors.get(entry.base or "")
        is_resized = is_embedding(entry.name) and in_base is not None and entry.shape != in_base.shape
        found = layers.find(entry) if terms or is_resized else None
        if found is None:
            continue
        name, index, parameter = found
        module = layers.modules[name]
        if isinstance(module, Norm) and isinstance(terms[0], Dense):
            norms.setdefault(name, {})[parameter] = terms[0].value
        elif isinstance(module, Experts) and module.obstacle is not None:
            raise _refusal(entry.name, module.obstacle)
        elif isinstance(module, Parameters):
            of_base = module.parameters_of_base[parameter]
            if of_base.shape != entry.shape:
                raise _refusal(entry.name)
            others[parameter] = rebuild(entry, terms, base).to(of_base.dtype, copy=True)  # or the file stays mapped
        elif isinstance(module, Linear) or (isinstance(module, Embedding | Experts | Logits) and parameter == "weight"):
            slices = parts.setdefault(name, {})
            if is_resized and isinstance(module, Embedding | Logits):
                _check_room(entry, module.base_layer.org_vocab_size, base)
                slices[index] = Part(size=entry.shape[0])
            slices[index] = _part(slices.get(index, Part()), module, parameter, entry, terms, base)
        else:
            raise _refusal(entry.name)
    _tie(artifact, base, layers, parts)
    contents: dict[str, Content] = {
        name: tuple(slices.get(i) for i in range(getattr(layers.modules[name], "n_slices", 1)))
        for name, slices in parts.items()
    }
    for name, values in norms.items():
        norm: Any = layers.modules[name]
        weight, bias = (values.get(parameter, norm.own(parameter)) for parameter in ("weight", "bias"))
        contents[name] = Gains(weight, bias)
    return contents | ({PARAMETERS: Values(others)} if others else {})


def _check_room(entry: WeightEntry, room: int, base: Checkpoint) -> None:
    size = entry.shape[0]
    if size > room:
        raise DeltacomeError(
            f"{entry.name} has {size} rows, and vLLM was started with room for {room}; "
            f"start it with --hf-overrides '{json.dumps(room_for(size, base.config))}'"
        )


def _refusal(weight: str, reason: str = "") -> DeltacomeError:
    why = f" ({reason})" if reason else ""
    return DeltacomeError(f"{weight} is nothing that vLLM can change{why}; serve the delta without vLLM, or merge it")


def _part(part: Part, module: Any, parameter: str, entry: WeightEntry, terms: list[Term], base: Checkpoint) -> Part:
    """The part with what the terms of another parameter change."""
    dense = next((term for term in terms if isinstance(term, Dense)), None)
    rest = [term for term in terms if not isinstance(term, Dense)]
    if parameter == "bias":
        if dense is None:
            raise DeltacomeError(f"{entry.name} is no bias as vLLM has it; merge the delta instead")
        return replace(part, bias=_difference(entry, dense, base).float())
    if dense is not None and dense.start:
        part = replace(part, rows=dense.value.clone())  # or the file stays mapped
    elif dense is not None:
        part = replace(part, matrices=(_difference(entry, dense, base),))
    if rest:
        sizes = (getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1))
        shared = share(rest, *(sizes if not isinstance(module, Embedding) else internals.ranks()))
        part = replace(part, packed=pack_blocks(shared, (entry.shape[0], entry.shape[1]), CPU))
        if isinstance(module, Embedding):
            part = replace(part, vectors=embedding_vectors(entry.name, shared))
    return part


def _difference(entry: WeightEntry, dense: Dense, base: Checkpoint) -> Tensor:
    """What is added to the base's values, zero where it has none, rounded to the fine-tuned model's dtype.

    What is small stays in float32: rounded, a router would send tokens to other experts.
    """
    if entry.base is None:
        return dense.value
    difference = dense.value.to(torch.float32, copy=True)
    values = base.read(entry.base)[: len(difference)].float()
    difference[: len(values)] -= values
    return difference.to(dense.value.dtype) if is_matrix(entry.shape) else difference


def _tie(artifact: Artifact, base: Checkpoint, layers: Layers, parts: dict[str, dict[int, Part]]) -> None:
    """Where the fine-tuned model has no output embedding of its own, the input embedding's changes are also its."""
    if any(name.endswith(OUTPUT_EMBEDDINGS) for name in artifact.entries):
        return
    if any(name.endswith(OUTPUT_EMBEDDINGS) for name in base.tensors):
        raise DeltacomeError(f"{artifact.folder} ties its embeddings and its base does not; merge it instead")
    changed = [name for name in parts if isinstance(layers.modules[name], Embedding)]
    heads = [name for name, module in layers.modules.items() if isinstance(module, Logits)]
    if changed and heads:
        part = parts[changed[0]][0]
        parts[heads[0]] = {0: replace(part, vectors=())}
