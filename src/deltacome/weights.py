"""What the name and the shape of a weight say about it."""

import re

SMALLEST_SIDE = 16  # of a matrix that is worth factors
# The last part of a module's name that marks it as an embedding or a language-model head.
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "embed_in", "embed_out", "lm_head", "word_embeddings", "embeddings"}
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


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
