"""Layers that share an input: the kernels do the work of all of them when the first one is called."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Layers of one module that have one input.
LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Shared:
    """What layers that share an input do: the first one that is called computes for those that have not been.

    Whether the input is the same is asked of each; one that has another computes again, so that nothing is lost but
    time.
    """

    def __init__(self, kernels: Any, deltas: list[list[tuple[Any, Tensor]]]) -> None:
        self.work = kernels.SharedWork(deltas)
        self.layers = {number for number, own in enumerate(deltas) if own}
        self.waiting: set[int] = set()
        self.inputs: Tensor | None = None  # held, so that no other can have its place
        self.computed: Any = None

    def add(self, layer: int, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add` for one of the layers."""
        if layer not in self.waiting or self.inputs is None or not _is_same(self.inputs, x):
            self.inputs, self.computed, self.waiting = x, self.work.compute(x), set(self.layers)
        self.work.finish(layer, y, x, self.computed)
        self.waiting.discard(layer)
        if not self.waiting:
            self.inputs = self.computed = None


def _is_same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


@dataclass(frozen=True)
class Turn:
    """One layer's part of shared work."""

    shared: Shared
    layer: int

    def add(self, y: Tensor, x: Tensor) -> None:
        self.shared.add(self.layer, y, x)
