"""Where a model of transformers has the weight that a checkpoint has under another name, or by itself."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.weights import OUTPUT_EMBEDDINGS, split_stack


@dataclass(frozen=True)
class ExpertSlot:
    """Where a model has an expert's weight: in which stack, under which number, and from which half of its outputs on.

    is_slice: whether the checkpoint has it in a stack too, and so the same way round as the model.
    """

    parameter: str
    expert: int
    half: int
    is_slice: bool


# Where the weights of an expert that a checkpoint has by themselves are in the stacks of transformers.
EXPERTS = {
    "gate_proj": (("gate_up_proj", 0),),
    "w1": (("gate_up_proj", 0),),
    "up_proj": (("gate_up_proj", 1), ("up_proj", 0)),
    "w3": (("gate_up_proj", 1),),
    "down_proj": (("down_proj", 0),),
    "w2": (("down_proj", 0),),
}


class ModuleNames:
    """Finds a model's parameter by the name that a checkpoint has for it."""

    def __init__(self, model: Any) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.known = set(parameters)
        self.stacks = {name for name, parameter in parameters.items() if parameter.ndim == 3}
        head = model.get_output_embeddings()
        self.found: dict[str, str | None] = {}  # stacks, by what a layer's experts have in common
        self.head = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")

    def find(self, name: str) -> str:
        """The parameter that shares the longest end with the name; of several, the one with the most parts in common.

        Raises:
            DeltacomeError: if there is none.
        """
        if name in self.known:
            return name
        if name.endswith(OUTPUT_EMBEDDINGS):
            return self.head  # transformers has given some families' another name
        found = _longest_end(name, self.known)
        if found is None:
            raise DeltacomeError(f"the base model has no weight {name}; the delta cannot be served, merge it instead")
        return found

    def find_expert(self, name: str) -> ExpertSlot | None:
        """Where a stack of the model holds the weight, None if it is not in a stack."""
        if name in self.known or not self.stacks:
            return None
        stack, index = split_stack(name)
        if index is not None:
            found = self._find_stack(stack)
            return None if found is None else ExpertSlot(found, index, 0, is_slice=True)
        one = re.fullmatch(r"(.+)\.(\d+)\.(\w+)\.weight", name)
        if one is None:
            return None
        for parameter, half in EXPERTS.get(one[3], ()):
            found = self._find_stack(f"{one[1]}.{parameter}")
            if found is not None:
                return ExpertSlot(found, int(one[2]), half, is_slice=False)
        return None

    def _find_stack(self, name: str) -> str | None:
        if name not in self.found:
            self.found[name] = _longest_end(name, self.stacks)
        return self.found[name]


def _longest_end(name: str, known: Iterable[str]) -> str | None:
    parts = name.split(".")
    for start in range(len(parts) - 1):
        end = ".".join(parts[start:])
        found = [other for other in known if other == end or other.endswith(f".{end}")]
        common = [len(set(other.split(".")) & set(parts)) for other in found]
        if found and common.count(max(common)) == 1:
            return found[common.index(max(common))]
    return None
