"""What deltas change of towers: the parts of a model that make embeddings of images, and what joins them to its text.

Their inputs are no tokens of a step. So the images of one adapter are encoded at a time, and all rows are its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from deltacome.vllm import internals
from deltacome.vllm.layers import Layer
from deltacome.vllm.rows import Rows, Step

PARAMETERS = "deltacome.towers"  # the name of what holds them, among those of vLLM's modules
OF_TEXT = re.compile(r"(.+\.)?(language_model|text_model|lm_head)\..+|(model\.)?(embed_tokens|layers|norm)\..+")


def is_of_text(weight: str) -> bool:
    """Whether a weight of a model is surely no part of a tower, by the name that a checkpoint has for it."""
    return OF_TEXT.fullmatch(weight) is not None


class Images(Step):
    """The images that are encoded now."""

    _adapter = 0

    def of_tokens(self, count: int) -> Rows:
        """So many rows of the adapter whose images they are."""
        return self._rows(np.full(count, self._adapter)) if self._adapter else self.tokens

    @contextmanager
    def of(self, adapter: int, slots: Sequence[int | None]) -> Iterator[None]:
        """While the block runs, images are those of an adapter's requests; slots: as for `set`."""
        self._adapter, self._slots = adapter, tuple(slots)
        try:
            yield
        finally:
            self._adapter = 0


class Parameters(Layer, internals.BaseLayerWithLoRA):
    """All parameters of towers that are not of linear layers; few, so that an adapter has whole ones of its own.

    Args:
        parameters: the base's, by vLLM's names.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_base = dict(parameters)

    @contextmanager
    def of(self, slot: int) -> Iterator[None]:
        """While the block runs, the model has those of the adapter in a slot."""
        content: Any = self.slots[slot]
        own: dict[str, Tensor] = {} if content is None else content.values
        before = {name: self.parameters_of_base[name].data for name in own}
        try:
            for name, value in own.items():
                self.parameters_of_base[name].data = value
            yield
        finally:
            for name, value in before.items():
                self.parameters_of_base[name].data = value
