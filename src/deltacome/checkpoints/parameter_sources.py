"""Where a checkpoint has all parameters of a model of transformers: whole, under other names, or in parts."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ModuleNames
from deltacome.errors import DeltacomeError
from deltacome.weights import OUTPUT_EMBEDDINGS

Read = Callable[[str], Tensor]


class ParameterSources:
    """The checkpoint's names of a model's parameters.

    names: of each parameter that it has whole. experts: of each stack of experts, its experts in order, each being one
    matrix or several with outputs one after another.

    Raises:
        DeltacomeError: if the checkpoint lacks a parameter.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.names: dict[str, str] = {}
        self.experts: dict[str, list[list[str]]] = {}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        prefix = model.base_model_prefix  # a checkpoint may have been saved with or without it
        for name in shapes:
            renamed = OUTPUT_EMBEDDINGS if name in OUTPUT_EMBEDDINGS else ()  # transformers has given heads one name
            for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", *renamed):
                if candidate in checkpoint.tensors:
                    self.names.setdefault(name, candidate)
        if shapes.keys() != self.names.keys():
            self._find(model, checkpoint, shapes)
        for name in shapes:
            if name not in self.names and name not in self.experts:
                raise DeltacomeError(
                    f"no data can be taken through {checkpoint.source}, which has {name} in another form; compress it "
                    "without --calibration"
                )

    def _find(self, model: Any, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
        """Look for what is in other places, as vision-language models have it, or in parts, as experts are."""
        names = ModuleNames(model)
        parts: dict[str, dict[tuple[int, int], str]] = {}
        for tensor in sorted(checkpoint.tensors.keys() - self.names.values()):
            with suppress(DeltacomeError):
                slot = names.find_expert(tensor)
                if slot is not None:
                    parts.setdefault(slot.parameter, {})[slot.expert, slot.half] = tensor
                    continue
                name = names.find(tensor)
                if name not in self.names and checkpoint.tensors[tensor].shape == shapes.get(name):
                    self.names[name] = tensor
        for name, found in parts.items():
            experts, m, n = shapes[name]
            stack = [[found[key] for key in sorted(found) if key[0] == expert] for expert in range(experts)]
            own = [[checkpoint.tensors[part].shape for part in expert] for expert in stack]
            if all(sum(shape[0] for shape in expert) == m and {shape[1] for shape in expert} == {n} for expert in own):
                self.experts[name] = stack

    def of(self, parameter: str) -> list[str]:
        """The checkpoint's names of all that a parameter is made of."""
        if parameter in self.names:
            return [self.names[parameter]]
        return [part for expert in self.experts[parameter] for part in expert]

    def read(self, parameter: str, read: Read) -> Tensor:
        """A parameter in float32, from `read` for the checkpoint's names."""
        if parameter in self.names:
            return read(self.names[parameter]).float()
        return torch.stack([torch.cat([read(part).float() for part in expert]) for expert in self.experts[parameter]])
