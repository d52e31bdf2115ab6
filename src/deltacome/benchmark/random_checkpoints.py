"""A base and a fine-tune of it on disk, made of random numbers, of the shapes that real ones have."""

import json
from pathlib import Path

import torch
from torch import Tensor

from deltacome.benchmark.random_model import settings_of
from deltacome.files import write_atomically, write_safetensors

STD = 0.02  # of the base's weights
CHANGE = 0.02  # the delta's norm over the base's
DECAY = -0.5  # of the k-th singular value of a delta, as a power of k: about as those of real fine-tunes


def write_pair(folder: Path, shape: str, layers: int | None) -> tuple[Path, Path]:
    """Write `base` and `finetuned`, Llamas in bfloat16, to a folder.

    Args:
        shape: one of `random_model.SHAPES`. layers: only so many of its layers.

    Raises:
        DeltacomeError: if there is no such shape.
    """
    settings = settings_of(shape) | ({} if layers is None else {"num_hidden_layers": layers})
    shapes = _shapes(settings)
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def write(place: Path, is_finetuned: bool) -> Path:
        place.mkdir()
        specs = {name: (torch.bfloat16, list(own)) for name, own in shapes.items()}
        write_safetensors(
            place / "model.safetensors", specs, lambda name: _weight(shapes[name], seeds[name], is_finetuned)
        )
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **settings}
        write_atomically(place / "config.json", json.dumps(config).encode())
        return place

    return write(folder / "base", False), write(folder / "finetuned", True)


def _shapes(settings: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, wide, vocabulary = (settings[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    inner = hidden // settings["num_attention_heads"] * settings["num_key_value_heads"]
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (inner, hidden),
        "self_attn.v_proj": (inner, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if not settings["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(settings["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}.weight": own for name, own in matrices.items()}
    return {**found, "model.norm.weight": (hidden,)}


def _weight(shape: tuple[int, ...], seed: int, is_finetuned: bool) -> Tensor:
    """The same base every time, with its delta or without; norms are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    weight = STD * torch.randn(m, n, generator=generator)
    if is_finetuned:
        values = torch.arange(1, n + 1) ** DECAY
        delta = (torch.randn(m, n, generator=generator) * values) @ torch.randn(n, n, generator=generator)
        weight += CHANGE * float(weight.norm() / delta.norm()) * delta
    return weight.bfloat16()
