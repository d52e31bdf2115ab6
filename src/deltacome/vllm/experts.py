"""A mixture of experts of vLLM's whose matrices adapters change.

Rows of the base stay what vLLM's kernel makes of them. Those of adapters that have changed experts are computed here
once more: what a matrix of an expert adds goes through the expert's activation, so that it cannot be added afterwards.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltacome.vllm import internals, moe
from deltacome.vllm.changes import Part
from deltacome.vllm.layers import Content, Layer
from deltacome.vllm.rows import Rows

GATE, DOWN, UP = range(3)  # of an expert's three matrices in a layer's content, as vLLM lists them
PAIRS = 2048  # of a token and one of its experts, that are computed at once, which bounds the memory


@dataclass(frozen=True)
class _Run:
    """Pairs from `first` to before `last` that have an expert and an adapter's content in common."""

    expert: int
    content: Any
    first: int
    last: int

    def part(self, matrix: int) -> Part | None:
        """What the content changes of one of the expert's matrices."""
        found: Part | None = self.content[3 * self.expert + matrix]
        return found


class Experts(Layer, internals.BaseLayerWithLoRA):
    """Before `MoERunner`, with a part for each matrix of each expert: of expert e from 3e on.

    obstacle: why they cannot be changed here, None if they can.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._shared_experts = base_layer._shared_experts  # vLLM looks for them here too, to replace their layers
        self.n_slices = 3 * moe.count(base_layer)
        self.tp_rank, self.tp_size = moe.ranks(base_layer)
        self.obstacle = moe.obstacle(base_layer)
        moe.after_experts(base_layer, self._after)

    @classmethod
    def can_replace_layer(cls, source_layer: Any, **rest: Any) -> bool:
        """As vLLM's."""
        return isinstance(source_layer, moe.MoERunner)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        y: Tensor = self.base_layer(*inputs, **named)
        return y

    def factors(self, lora_a: Any, lora_b: Any) -> Content:
        order = [(matrix, expert) for expert in range(len(lora_a[0])) for matrix in range(3)]
        return tuple(Part(matrices=(lora_a[matrix][expert], lora_b[matrix][expert])) for matrix, expert in order)

    def refusal(self, content: Content) -> str | None:
        return "experts are computed one after another"

    def _after(self, y: Tensor, x: Tensor, weights: Tensor, chosen: Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.deltacome.change_experts(y, x, weights, chosen, self.name)
        else:
            self.change(y, x, weights, chosen)

    def change(self, y: Tensor, x: Tensor, weights: Tensor, chosen: Tensor) -> None:
        """Compute the rows of adapters that have changed experts, in place.

        Args:
            y: what the base's experts, weighted, add up to, (rows, n): with tensor parallelism this GPU's share of it.
            x: their inputs, (rows, n).
            weights, chosen: numbers of experts, (rows, k), and what the outputs of each count.
        """
        step_rows = self.step.tokens
        contents, rows, owners = step_rows.prepared(self.name, partial(self._owners, step_rows))
        if not contents:
            return
        size = max(PAIRS // chosen.shape[1], 1)
        for own, owner in zip(rows.split(size), owners.split(size), strict=True):
            y[own] = self._compute(contents, owner, x[own], weights[own], chosen[own].long()).to(y.dtype)

    def _owners(self, rows: Rows) -> tuple[list[Any], Tensor, Tensor]:
        """The contents of the step's adapters, the numbers of their rows, and of each row its content's."""
        found = self.contents(rows)
        if not found:
            return [], torch.zeros(0), torch.zeros(0)
        found.sort(key=lambda pair: int(pair[1][0]))  # GPUs need not have them in the same slots, and add up pairs
        owners = [torch.full_like(numbers, i) for i, (_, numbers) in enumerate(found)]
        return [content for content, _ in found], torch.cat([numbers for _, numbers in found]), torch.cat(owners)

    def _compute(self, contents: list[Any], owners: Tensor, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the experts of adapters make of inputs (rows, n), weighted and added up, in float32."""
        keys, order = (chosen * len(contents) + owners[:, None]).flatten().sort()
        found, lengths = keys.unique_consecutive(return_counts=True)
        runs, first = [], 0
        for key, length in zip(found.tolist(), lengths.tolist(), strict=True):
            runs.append(_Run(key // len(contents), contents[key % len(contents)], first, first + length))
            first += length
        rows = order // chosen.shape[1]
        inputs = x[rows]

        width = moe.width(self.base_layer)
        inner = self._changed(runs, (GATE, UP), inputs, width * self.tp_size)
        if self.tp_size > 1:
            inner = internals.all_reduce(inner).view(len(rows), 2, self.tp_size, width)[:, :, self.tp_rank].flatten(1)
        for run in runs:
            inner[run.first : run.last] += moe.gate_and_up(self.base_layer, run.expert, inputs[run.first : run.last])
        hidden = moe.activate(self.base_layer, *inner.split(width, dim=1)).to(x.dtype)

        whole = internals.gather(hidden) if self.tp_size > 1 else hidden
        outputs = self._changed(runs, (DOWN,), whole, x.shape[1])  # which the layer sums over GPUs itself
        for run in runs:
            outputs[run.first : run.last] += moe.down(self.base_layer, run.expert, hidden[run.first : run.last])
        outputs *= weights.flatten()[order, None]
        return torch.zeros(x.shape, device=x.device).index_add_(0, rows, outputs)

    def _changed(self, runs: list[_Run], matrices: tuple[int, ...], x: Tensor, size: int) -> Tensor:
        """This GPU's part of what the contents add to outputs, `size` of each matrix, for inputs (pairs, n)."""
        y = torch.zeros(len(x), len(matrices) * size, device=x.device)
        deltas, firsts = [], []
        for run in runs:
            for i, matrix in enumerate(matrices):
                part = run.part(matrix)
                if part is None:
                    continue
                pairs = torch.arange(run.first, run.last, device=x.device)
                deltas += [(block, pairs) for block in part.packed]
                firsts += [i * size] * len(part.packed)
                if part.matrices and self.tp_rank == 0:
                    product = x[run.first : run.last]
                    for own in part.matrices:
                        product = product @ own.T.to(product.dtype)
                    y[run.first : run.last, i * size : (i + 1) * size] += product
        if deltas:
            self.kernels.Work(deltas, firsts).add(y, x)
        return y
