"""The forward pass of a stack of experts of transformers, expert by expert, each product in the caller's hands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacks of experts' weights."""
    return getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def can_run(module: nn.Module) -> bool:
    """Whether `run_experts` knows how a module with stacks of experts computes."""
    return hasattr(module, "_apply_gate")


def run_experts(
    module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, product: Callable[[str, int, Tensor, Tensor], Tensor]
) -> Tensor:
    """A module's outputs (tokens, n) for hidden states (tokens, n).

    Args:
        chosen, weights: numbers of experts, (tokens, k), and what each one's outputs count.
        product: gives an expert's outputs (count, m) of one stack, biases included, for the stack's name
            (`gate_up_proj`, `up_proj`, `down_proj`), the expert's number, inputs (count, n) and which tokens these are
            of.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        inner = activate(product(first, expert, hidden[tokens], tokens))
        outputs = product("down_proj", expert, inner, tokens)
        total.index_add_(0, tokens, outputs.float() * weights[tokens, places, None].float())
    return total.to(hidden.dtype)
