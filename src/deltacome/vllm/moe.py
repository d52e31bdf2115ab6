"""What the plugin touches of vLLM's mixtures of experts: which kernel computes them, and where their matrices are."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as unquantized
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

# Where vLLM looks for LoRA's layer; its own stays for experts that ours cannot change.
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle import unquantized as oracle
from vllm.platforms import current_platform

__all__ = ["FusedMoEWithLoRA", "MoERunner"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
BLOCK = 16  # outputs that vLLM's portable CPU kernel has side by side


def keep_matrices_readable() -> None:
    """Have experts of a model with adapters computed by kernels whose matrices we can read.

    With adapters vLLM takes kernels that add LoRA's factors: on a CPU Triton's, which are not there. Our layer needs
    nothing of them. On a CPU it is the portable one of vLLM's own, and Triton's where they run.
    """
    original = unquantized.select_unquantized_moe_backend

    def select(moe_config: Any) -> Any:
        if not moe_config.is_lora_enabled or not current_platform.is_cpu():
            return original(moe_config)
        plain = copy(moe_config)
        plain.is_lora_enabled = False
        backend, kernel = original(plain)
        return backend, CPUUnquantizedExperts if issubclass(kernel, CPUUnquantizedExperts) else kernel

    unquantized.select_unquantized_moe_backend = select
    oracle._trtllm_bf16_lora_supported = lambda moe_config: False  # its matrices are shuffled


def obstacle(runner: Any) -> str | None:
    """Why the experts of one of vLLM's layers cannot be changed, None if they can."""
    experts, config = runner.routed_experts, runner.moe_config
    parallel = config.moe_parallel_config
    if not isinstance(experts.quant_method, unquantized.UnquantizedFusedMoEMethod):
        return "experts of a quantized base are not changed"
    if parallel.use_ep or parallel.dp_size > 1 or config.pcp_size > 1 or config.is_sequence_parallel:
        return "experts are spread over GPUs by tensor parallelism alone"
    if experts.quant_method.unquantized_backend.name not in ("CPU", "TRITON") or experts.quant_method.is_monolithic:
        return "vLLM's kernel for experts has their matrices in an order of its own"
    if config.activation.value not in ACTIVATIONS or experts.swiglu_limit is not None:
        return f"the activation {config.activation.value} of experts is not known"
    if config.has_bias or experts.apply_router_weight_on_input or config.hidden_dim != config.hidden_dim_unpadded:
        return "experts with biases, weighted inputs or padded ones are not changed"
    if runner.routed_input_transform is not None:
        return "experts in a space of their own are not changed"
    if experts.global_num_experts != config.num_logical_experts or experts.expert_map is not None:
        return "experts are not the checkpoint's, one by one"
    return None


def count(runner: Any) -> int:
    """How many experts a layer has."""
    return int(runner.moe_config.num_logical_experts)


def width(runner: Any) -> int:
    """How many outputs an expert's gate has on this GPU."""
    return int(runner.moe_config.intermediate_size_per_partition_unpadded)


def ranks(runner: Any) -> tuple[int, int]:
    """This GPU's number, and how many share each expert."""
    parallel = runner.moe_config.moe_parallel_config
    return parallel.tp_rank, parallel.tp_size


def activate(runner: Any, gate: Tensor, up: Tensor) -> Tensor:
    """What goes into an expert's last matrix."""
    return ACTIVATIONS[runner.moe_config.activation.value](gate) * up


def gate_and_up(runner: Any, expert: int, x: Tensor) -> Tensor:
    """This GPU's outputs of the base's gate and up of an expert, (rows, 2 width), for inputs (rows, n)."""
    y, own = _product(runner, runner.routed_experts.w13_weight[expert], x), width(runner)
    padded = y.shape[1] // 2
    return y if padded == own else torch.cat([y[:, :own], y[:, padded : padded + own]], dim=1)


def down(runner: Any, expert: int, x: Tensor) -> Tensor:
    """What this GPU adds to the outputs of the base's expert, (rows, n), for what its width goes in, (rows, width)."""
    weight = runner.routed_experts.w2_weight[expert]
    padding = weight.shape[1] - x.shape[1]
    return _product(runner, weight, torch.nn.functional.pad(x, (0, padding)) if padding else x)


def _product(runner: Any, weight: Tensor, x: Tensor) -> Tensor:
    kernel = runner.routed_experts.quant_method.moe_kernel.fused_experts
    if not isinstance(kernel, CPUUnquantizedExperts) or kernel._use_zentorch:
        return linear(x, weight)
    blocks = weight.view(-1, weight.shape[1], BLOCK)  # of so many outputs, each input's side by side
    return (x @ blocks).transpose(0, 1).reshape(len(x), -1)


def after_experts(runner: Any, change: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
    """Have a layer's outputs changed in place, given them, its inputs, and weights and numbers of chosen experts."""
    experts = runner.routed_experts
    original = experts.forward_modular

    def forward_modular(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any, **named: Any) -> Any:
        y = original(x, topk_weights, topk_ids, *rest, **named)
        change(y, x, topk_weights, topk_ids)
        return y

    experts.forward_modular = forward_modular
    experts.lora_base_layer_prefix = "base_layer."  # by which vLLM finds the weights when it loads others
