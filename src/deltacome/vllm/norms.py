"""A norm of vLLM's that adapters have their own of."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from deltacome.vllm import internals
from deltacome.vllm.changes import Gains
from deltacome.vllm.layers import Content, Layer, apply_change
from deltacome.vllm.rows import Rows


class Norm(Layer, internals.BaseLayerWithLoRA):
    """A norm that adapters have their own of.

    The rows of adapters are normalized a second time, in float32: scaling what the base's norm gives would round twice.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_layer_norm = isinstance(base_layer, internals.LayerNorm)
        self.epsilon = base_layer.eps if self.is_layer_norm else base_layer.variance_epsilon
        self.weights: Tensor | None = None
        self.offset = 1.0 if isinstance(base_layer, internals.GemmaRMSNorm) else 0.0

    def own(self, parameter: str) -> Tensor | None:
        """A parameter of the base's norm, on the CPU."""
        value = getattr(self.base_layer, parameter, None)
        return None if value is None else value.detach().cpu()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            y = self.base_layer(x)
            apply_change(self, y, x)
            return y
        total = x.float() + residual.float()  # before the base's norm, which may write over both
        y, residual = self.base_layer(x, residual)
        apply_change(self, y, total)
        return y, residual

    def make_tables(self) -> None:
        weight = getattr(self.base_layer, "weight", None)
        if weight is None:
            return
        size, device = (len(self.slots) + 1, weight.shape[-1]), self.step.device
        self.has_own = torch.zeros(len(self.slots) + 1, dtype=torch.bool, device=device)
        self.weights = torch.zeros(size, device=device)
        self.biases = torch.zeros(size, device=device) if self.is_layer_norm else None

    def refusal(self, content: Content) -> str | None:
        return "the base has no gains there" if self.weights is None else None

    def fill_tables(self, index: int) -> None:
        if self.weights is None:
            return
        gains = self.slots[index]
        self.has_own[index] = gains is not None
        if isinstance(gains, Gains):
            self.weights[index] = gains.weight.float() + self.offset
            if self.biases is not None:
                self.biases[index] = 0 if gains.bias is None else gains.bias

    def _change_in_graph(self, y: Tensor, x: Tensor) -> None:
        """As `change`, with nothing that a CUDA graph would not do again for other tenants."""
        if self.weights is None or not self.step.slots.used:
            return
        rows = self.step.slots.of_rows[: len(y)]

        def of_rows(table: Tensor) -> Tensor:
            return table.index_select(0, rows).view(len(y), *[1] * (y.ndim - 2), -1)

        normalize = layer_norm if self.is_layer_norm else rms_norm
        changed = normalize(x.float(), x.shape[-1:], eps=self.epsilon) * of_rows(self.weights)
        if self.biases is not None:
            changed += of_rows(self.biases)
        y.copy_(torch.where(of_rows(self.has_own), changed.to(y.dtype), y))

    def change(self, y: Tensor, x: Any) -> None:
        if self.step.in_graph(len(y)):
            self._change_in_graph(y, x)
            return
        rows = self.step.tokens
        values = rows.prepared((self.name, y.ndim), partial(self._values, rows, y.ndim))
        if values is None:
            return
        numbers, weight, bias = values
        normalize = layer_norm if self.is_layer_norm else rms_norm
        changed = normalize(x[numbers].float(), x.shape[-1:], eps=self.epsilon) * weight
        y[numbers] = (changed if bias is None else changed + bias).to(y.dtype)

    def _values(self, rows: Rows, dimensions: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Row numbers, and of each row the gains and the biases: (rows, 1, ..., n)."""
        contents = self.contents(rows)
        if not contents:
            return None
        counts = torch.tensor([len(numbers) for _, numbers in contents], device=self.step.device)

        def stack(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values).float().repeat_interleave(counts, dim=0)
            return stacked.view(len(stacked), *[1] * (dimensions - 2), -1)

        biases = [gains.bias for gains, _ in contents if gains.bias is not None]
        weight = stack([gains.weight for gains, _ in contents]) + self.offset
        return torch.cat([numbers for _, numbers in contents]), weight, stack(biases) if biases else None
