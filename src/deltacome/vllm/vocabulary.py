"""How many tokens a base and its deltas have, and vLLM's setting that makes room for those that some have added."""

from collections.abc import Mapping
from typing import Any, Protocol

from deltacome.weights import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS


class HasShape(Protocol):
    """A weight, as a checkpoint or an artifact lists it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def vocabulary(weights: Mapping[str, HasShape]) -> int:
    """Rows of the embeddings among weights, given by name; 0 without any."""
    ends = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS)
    return max((weight.shape[0] for name, weight in weights.items() if name.endswith(ends)), default=0)


def room_for(size: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be given to vLLM as `hf_overrides` for so many tokens over a base, by its config.json."""
    return {"text_config": {"vocab_size": size}} if "text_config" in config else {"vocab_size": size}


def has_room(overrides: Any) -> bool:
    """Whether such `hf_overrides` were given."""
    return isinstance(overrides, dict) and any(
        "vocab_size" in part for part in (overrides, overrides.get("text_config", ()))
    )
