"""What the name and the shape of a weight say about it."""

import re

SMALLEST_SIDE = 16  # of a matrix that is worth factors
# The last part of a module's name that marks it as an embedding or a language-model head.
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "embed_in", "embed_out", "lm_head", "word_embeddings", "embeddings"}
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


# Parts of names that wrappers of a model put in: torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
VALUE_HEAD = "v_head."  # of reinforcement learning with TRL; no part of the language model


def unwrapped(name: str) -> str:
    """A weight's name without what wrappers of the model have put in, DistributedDataParallel's beginning too."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("module.")


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one that older models saved with their weights and newer ones compute: frequencies, masks."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and name.endswith(("attn.bias", "attention.bias"))
    return is_mask or (len(shape) <= 1 and name.endswith(("attn.masked_bias", "attention.masked_bias")))


def is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of an embedding or a language-model head."""
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def module_kind(name: str) -> str:
    """A weight's name with the numbers of its layer and expert left out: `model.layers.*.mlp.up_proj.weight`."""
    return re.sub(r"\.\d+\.", ".*.", split_stack(name)[0])


def split_stack(name: str) -> tuple[str, int | None]:
    """The name of the stack that a matrix is part of, and its number there; the name itself and None if of none."""
    found = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, None)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Two dimensions, neither so small that factors would save nothing."""
    return len(shape) == 2 and min(shape) >= SMALLEST_SIDE
