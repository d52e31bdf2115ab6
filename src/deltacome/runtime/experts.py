"""Stacks of experts, as transformers has them, for a batch whose tenants have changed them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltacome.errors import DeltacomeError
from deltacome.experts import can_run, run_experts
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.replacement import Replacement
from deltacome.runtime.tenant import Change


class Experts(Replacement):
    """Takes the place of `forward` of a module with stacks of experts' weights.

    Without changes in the batch the module runs as it is; with them, expert by expert.
    """

    def __init__(self, name: str, module: Any, kernels: Any) -> None:
        self.name, self.module, self.kernels = name, module, kernels
        self.forward: Callable[..., Tensor] = module.forward
        if not can_run(module):
            raise DeltacomeError(
                f"{name} is a {type(module).__name__}, whose deltas cannot be served; merge it instead"
            )

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden: (tokens, n). chosen: numbers of experts, (tokens, k), and weights: theirs."""
        batch = running.get()
        changes = [] if batch is None else batch.prepared(self.name, lambda: batch.changes(self.name))
        if batch is None or not changes:
            return self.forward(hidden, chosen, weights)
        owners = self._owners(batch, changes, hidden)

        def product(parameter: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
            return self._product(parameter, expert, x, changes, owners[tokens])

        return run_experts(self.module, hidden, chosen, weights, product)

    def _owners(self, batch: Batch, changes: list[tuple[Change, list[int]]], hidden: Tensor) -> Tensor:
        """For each token the number of its change, -1 for none."""
        tokens, rest = divmod(len(hidden), len(batch))
        if rest:
            raise DeltacomeError(f"{self.name} was given {len(hidden)} rows for a batch of {len(batch)}")
        owners = torch.full((len(hidden),), -1, device=hidden.device)
        for number, (_, rows) in enumerate(changes):
            owners[batch.token_rows(rows, tokens, hidden.device)] = number
        return owners

    def _product(
        self, parameter: str, expert: int, x: Tensor, changes: list[tuple[Change, list[int]]], owners: Tensor
    ) -> Tensor:
        """One expert's outputs (tokens, m) for x (tokens, n)."""
        weight: Tensor = getattr(self.module, parameter)[expert]
        y = linear(x, weight.T if self.module.is_transposed else weight)
        bias = getattr(self.module, f"{parameter}_bias")[expert] if self.module.has_bias else None
        if bias is not None:
            y += bias
        parts: dict[int, list[Any]] = {}
        for number, (change, _) in enumerate(changes):
            rows = (owners == number).nonzero()[:, 0]
            if not len(rows):
                continue
            for first, packed in change.experts.get((parameter, expert), ()):
                parts.setdefault(first, []).append((packed, rows))
            if bias is not None and f"{parameter}_bias" in change.exact:
                y[rows] += (change.exact[f"{parameter}_bias"][expert] - bias).to(y.dtype)
        for first, deltas in parts.items():
            self.kernels.Work(deltas).add(y[:, first : first + deltas[0][0].shape[0]], x)
        return y
