"""Layers that share an input, or seem to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltacome.runtime.sharing import Shared, Turn


class Counted:
    """Kernels that add to each layer's output its input times the layer's number from 1."""

    computed = 0

    def __init__(self, deltas: list[list[Any]]) -> None:
        self.deltas = deltas

    def compute(self, x: Tensor) -> Tensor:
        Counted.computed += 1
        return x.clone()

    def finish(self, layer: int, y: Tensor, x: Tensor, computed: Tensor) -> None:
        y += (layer + 1) * computed


class Kernels:
    SharedWork = Counted


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[Turn]:
    """Of three layers, the second of which no tenant changes."""
    monkeypatch.setattr(Counted, "computed", 0)
    shared = Shared(Kernels, [[1], [], [1]])
    return [Turn(shared, number) for number in range(3)]


def result(turn: Turn, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    turn.add(y, x)
    return y


def test_one_computes_for_all_and_keeps_nothing(turns: list[Turn]) -> None:
    x = torch.randn(2, 3)
    for step in range(1, 3):
        x = x + 1
        assert torch.equal(result(turns[0], x), x)
        assert torch.equal(result(turns[2], x.view(2, 3)), 3 * x)
        assert Counted.computed == step
        assert turns[0].shared.inputs is None and turns[0].shared.computed is None


def test_an_input_that_is_filled_anew(turns: list[Turn]) -> None:
    """As a step's may be, at the same place: each layer takes what was computed only once."""
    x = torch.ones(2, 3)
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        assert torch.equal(result(turns[0], x), x)
        assert torch.equal(result(turns[2], x), 3 * x)
    assert Counted.computed == 3


def test_other_inputs_are_computed_by_themselves(turns: list[Turn]) -> None:
    """As keys and values have them of another sequence."""
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(2):
        assert torch.equal(result(turns[0], first), first)
        assert torch.equal(result(turns[2], second), 3 * second)
    assert torch.equal(result(turns[2], first[:1]), 3 * first[:1])
