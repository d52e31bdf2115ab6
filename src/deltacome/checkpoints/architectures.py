"""Which of transformers' classes a checkpoint's model is."""

from typing import Any


def auto_class(model_type: str | None) -> Any:
    """The class to load a model of that type with: `AutoModelForCausalLM`, else `AutoModelForImageTextToText`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
