"""Compress a checkpoint of a 7B model's shapes, made up of random weights: time and peak memory.

    python seven_billion.py FOLDER [--layers 1] [--ratio 16] [--method rate-distortion]

Layers are alike, so that one or two of them show what 32 take. The delta has singular values that decay as those of
real fine-tunes do.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from deltacome import compress
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 4096, 11008, 32000, 32
DECAY = -0.5  # of the k-th singular value, as a power of k
LAYERS = 32  # of the whole model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--method", default="rate-distortion")
    arguments = parser.parse_args()
    base, finetuned = (arguments.folder / name for name in ("base", "finetuned"))
    if not finetuned.exists():
        write(base, arguments.layers, False)
        write(finetuned, arguments.layers, True)
    start = time.perf_counter()
    report = compress(base, finetuned, arguments.folder / "delta", ratio=arguments.ratio, method=arguments.method)
    seconds = time.perf_counter() - start
    pairs = pair(Checkpoint(base), Checkpoint(finetuned))
    largest = max(4 * torch.Size(p.shape).numel() for p in pairs)
    print(
        f"{arguments.layers} of {LAYERS} layers, embedding and head: {seconds:.0f} s; peak memory "
        f"{report['peak_bytes'] / 2**30:.2f} GiB above the imports (bound: {(4 * largest + 2**30) / 2**30:.2f}); "
        f"1/{report['artifact_ratio']:.1f}"
    )


def write(folder: Path, layers: int, is_finetuned: bool) -> None:
    """A checkpoint in bfloat16, drawn anew from the same seeds."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    tensors = {}
    for seed, (name, (m, n)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.randn(m, n, generator=generator)
        if is_finetuned:
            values = torch.arange(1, n + 1) ** DECAY
            change = (torch.randn(m, n, generator=generator) * values) @ torch.randn(n, n, generator=generator)
            weight += 0.02 * float(weight.norm() / change.norm()) * change
        tensors[name] = weight.bfloat16()
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in ("input", "post_attention")]
    for name in ["model.norm", *norms]:
        tensors[f"{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
