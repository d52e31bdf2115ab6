"""Which of the base's weights a tensor of an adapter is about, and which part of the change it is."""

from collections.abc import Collection, Mapping

from deltacome.weights import unwrapped

PREFIX = "base_model.model."
# The parts of a change of a weight, by the ends of the names that PEFT has for them.
PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
WHOLE_CHANGES = {("a", "b"), ("a", "b", "magnitude"), ("embedding_a", "embedding_b"), ("rows",)}


def split_name(name: str) -> tuple[str, str | None]:
    """The weight or bias that an adapter's tensor is about, as PEFT names it, and the part; None if it is all of it."""
    plain = unwrapped(name).removeprefix(PREFIX)
    for suffix, part in PARTS.items():
        if plain.endswith(f".{suffix}"):
            return f"{plain.removesuffix(f'.{suffix}').removesuffix('.base_layer')}.weight", part
    if plain.endswith(".lora_B.bias"):
        return f"{plain.removesuffix('.lora_B.bias')}.bias", "bias"
    return plain.replace(".modules_to_save", "").replace(".base_layer", ""), None


def find_weight(weight: str, names: Collection[str], renames: Mapping[str, str]) -> str | None:
    """The base's name for a weight: the mapped one, the same, or the only one that begins otherwise; None if none.

    The number of a layer is never part of a beginning.
    """
    for old in sorted(renames, key=len, reverse=True):
        renamed = renames[old] + weight.removeprefix(old)
        if weight.startswith(old) and renamed in names:
            return renamed
    if weight in names:
        return weight
    parts = weight.split(".")
    for start in range(len(parts) - 1):
        if start and parts[start - 1].isdigit():
            return None
        end = f".{'.'.join(parts[start:])}"
        found = [name for name in names if f".{name}".endswith(end)]
        if found:
            return found[0] if len(found) == 1 else None
    return None
