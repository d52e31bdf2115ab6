"""Models and tenants of random numbers, of the shapes and sizes that real ones have: for measuring time and memory."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.errors import DeltacomeError
from deltacome.runtime.kernels.layout import GPU_WIDTHS, VECTOR, WIDTHS, plan_groups
from deltacome.runtime.kernels.packed import UNIT, Group, Lined, Packed, PackedTerm, Tiled
from deltacome.runtime.model import share
from deltacome.runtime.tenant import Change, Tenant

# Llama shapes.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
SMALL_VOCABULARY = 256
# The part of a matrix's components that the default method stores at each bit-width, at 1/16 on the testbed.
PLAN = {4: 0.02, 3: 0.07, 2: 0.40, 1: 0.51}


def random_model(shape: str, layers: int | None, device: torch.device) -> Any:
    """A Llama of random weights; with `layers`, only so many, and a small vocabulary.

    Raises:
        DeltacomeError: if there is no such shape.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = settings_of(shape)
    if layers is not None:
        settings |= {"num_hidden_layers": layers, "vocab_size": SMALL_VOCABULARY}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=computed_in(device))
    return model.to(device).eval()


def settings_of(shape: str) -> dict[str, Any]:
    """The settings of a Llama of a shape.

    Raises:
        DeltacomeError: if there is no such shape.
    """
    if shape not in SHAPES:
        raise DeltacomeError(f"there is no shape {shape}; choose from {', '.join(SHAPES)}")
    return dict(SHAPES[shape])


def computed_in(device: torch.device) -> torch.dtype:
    """The dtype that models have on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shared_with_tenants(model: Any) -> Any:
    """A model that takes tenants and has the weights of another one, which stays as it is."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared = copy.deepcopy(model, weights)
    share(shared, None)
    return shared


def random_tenant(name: str, model: Any, ratio: float, seed: int) -> Tenant:
    """A tenant with random codes for every matrix of a model, of the plan and size that a real one has."""
    generator = torch.Generator(model.device).manual_seed(seed)
    changes: dict[str, Change] = {}
    packed: dict[int, tuple[Packed, Tensor | None]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight
            if id(weight) not in packed:  # else it is tied
                packed[id(weight)] = _random_change(weight, ratio, isinstance(module, nn.Embedding), generator)
            delta, vectors = packed[id(weight)]
            own = (vectors,) if isinstance(module, nn.Embedding) and vectors is not None else ()
            changes[module_name] = Change((delta,), vectors=own)
    return Tenant(name, None, changes)


def _random_change(
    weight: Tensor, ratio: float, is_embedding: bool, generator: torch.Generator
) -> tuple[Packed, Tensor | None]:
    m, n = weight.shape
    if not is_embedding:
        return random_delta(m, n, ratio, "uv", generator), None
    delta = random_delta(m, n, ratio, "v", generator)
    return delta, torch.randn(delta.rank, n, generator=generator, device=generator.device) * 1e-4


def random_delta(m: int, n: int, ratio: float, rotated: str, generator: torch.Generator) -> Packed:
    """Random codes for a matrix (m, n) on the generator's device, of the size that a delta of the ratio has."""
    device = generator.device
    components = 16 * m * n / ratio / sum(bits * part for bits, part in PLAN.items()) / (m + n)
    ranks = {bits: max(round(components * part), 1) for bits, part in PLAN.items()}

    on_gpu = device.type == "cuda"

    def codes(length: int, columns: int, width: int) -> Tiled | Lined:
        unit = UNIT if on_gpu else 32
        rows = -(-length * width // unit) * unit // 32
        size = (rows * columns + (0 if on_gpu else VECTOR),)
        words = torch.randint(-(2**31), 2**31, size, generator=generator, device=device, dtype=torch.int32)
        return Lined(words.view(torch.uint8).view(columns, -1)) if on_gpu else Tiled(words, rows, columns)

    plan = plan_groups(ranks.items(), *((GPU_WIDTHS, UNIT) if on_gpu else (WIDTHS, 32)))
    groups = []
    for width, runs in plan.items():
        count = sum(length for _, length, _ in runs)
        groups.append(Group(width, tuple(runs), codes(count, m, width), codes(n, count, width)))
    scales = (1e-4 * torch.rand(rank, generator=generator, device=device) for rank in ranks.values())
    terms = tuple(PackedTerm(bits, scale) for bits, scale in zip(ranks, scales, strict=True))
    return Packed((m, n), terms, rotated, groups=tuple(groups))
