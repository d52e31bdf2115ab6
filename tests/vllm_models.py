"""Random models with deltas in a real vLLM, beside the same models in transformers."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its state can be looked at
    "VLLM_LOGGING_LEVEL": "WARNING",
}

from openai import APIConnectionError, OpenAI
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from conftest import Save, fine_tune, make_model
from deltacome import compress, merge

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "mixtral": MixtralConfig,
    "olmoe": OlmoeConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}


def make(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model with biases and norms that are not all alike."""
    torch.manual_seed(seed)
    sizes = {**SIZES, **options}
    model = (
        make_model(seed, **sizes) if family == "llama" else AutoModelForCausalLM.from_config(CONFIGS[family](**sizes))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_delta(
    save: Save, base: Path, model: PreTrainedModel, seed: int, out: Path, factor: float = 1.0, **options: Any
) -> Path:
    """factor: what all weights are multiplied by at the end."""
    fine_tune(model, seed, size=0.2 if factor == 1 else 0.05)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    compress(base, save(model, "finetuned"), out, **{"ratio": 4, **options})
    return out


class Models:
    """A base with two deltas, and the models of all three in transformers."""

    def __init__(self, save: Save, folder: Path, family: str, options: dict[str, Any], **sizes: Any) -> None:
        self.family = family
        self.base = save(make(family, **sizes), "base", torch.float32)
        self.deltas = {
            name: make_delta(save, self.base, make(family, **sizes), seed, folder / name, **options)
            for seed, name in ((1, "a"), (2, "b"))
        }
        self.models = {"base": AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()}
        for name, delta in self.deltas.items():
            self.add_model(name, delta, folder)

    def add_model(self, name: str, delta: Path, folder: Path) -> None:
        merged = folder / f"merged-{name}"
        merge(self.base, delta, merged, torch.float32)
        self.models[name] = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()


class Served(Models):
    """Such models with the base and the deltas in vLLM. engine: `start`'s options."""

    def __init__(
        self, save: Save, folder: Path, family: str, options: dict[str, Any], engine: Any = (), **sizes: Any
    ) -> None:
        super().__init__(save, folder, family, options, **sizes)
        self.llm = start(self.base, **dict(engine))

    def requests(self, names: list[str]) -> list[LoRARequest | None]:
        return [request(name, self.deltas[name]) if name in self.deltas else None for name in names]

    def check(
        self,
        names: list[str],
        prompts: list[list[int]],
        tolerance: float = 2e-3,
        *,
        requests: list[LoRARequest | None] | None = None,
        of_prompts: bool = True,
    ) -> list[int]:
        """Greedy answers and the log-probabilities of their tokens, and of the prompts', are each model's own.

        requests: adapters, if not those of the names. of_prompts: with these vLLM uses no cached prefix.

        Returns:
            How many tokens of each prompt had been cached.
        """
        asked = SamplingParams(
            max_tokens=8, temperature=0, logprobs=1, prompt_logprobs=1 if of_prompts else None, ignore_eos=True
        )
        outputs = ask(self.llm, prompts, requests or self.requests(names), asked)
        for output, name, prompt in zip(outputs, names, prompts, strict=True):
            tokens = [*prompt, *output.outputs[0].token_ids]
            with torch.no_grad():
                logits = self.models[name](torch.tensor([tokens])).logits[0].float()
            expected = logits.log_softmax(-1)
            assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
            steps = (
                [*output.prompt_logprobs[1:], *output.outputs[0].logprobs] if of_prompts else output.outputs[0].logprobs
            )
            for place, step in enumerate(steps, 0 if of_prompts else len(prompt) - 1):
                assert abs(step[tokens[place + 1]].logprob - float(expected[place, tokens[place + 1]])) < tolerance
        return [output.num_cached_tokens for output in outputs]


def make_adapter(models: Models, folder: Path) -> Path:
    """A PEFT adapter of some layers, and its merged model as `peft` among the models."""
    merged = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32).eval()
    rank, tensors = 4, {}
    generator = torch.Generator().manual_seed(9)
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
            m, n = module.weight.shape
            a, b = torch.randn(rank, n, generator=generator), 0.1 * torch.randn(m, rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    models.models["peft"] = merged
    return folder


def start(base: Path, **options: Any) -> LLM:
    return LLM(
        str(base),
        **{
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "block_size": 32,
            "enable_lora": True,
            "max_loras": 3,
            "enforce_eager": True,
            "disable_log_stats": True,
            **options,
        },
    )


def stop(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def manager_of(llm: LLM) -> Any:
    return runner_of(llm).lora_manager._adapter_manager


NUMBERS: dict[tuple[str, Path], int] = {}


def request(name: str, folder: Path) -> LoRARequest:
    return LoRARequest(name, NUMBERS.setdefault((name, folder), len(NUMBERS) + 1), str(folder))


def ask(llm: LLM, prompts: list[list[int]], requests: Any, sampling: SamplingParams) -> list[Any]:
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, lora_request=requests, use_tqdm=False)


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    return [torch.randint(2, 259, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def vllm_server(base: Path, options: list[str], environment: dict[str, str], log: Path) -> Iterator[OpenAI]:
    """A client of `deltacome serve --engine vllm`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("deltacome")
    command = [str(program), "serve", str(base), "--engine", "vllm", "--port", str(port), *options]
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--", "--enforce-eager"], env=environment, stdout=file, stderr=file)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            for _ in range(240):
                try:
                    client.models.list()
                    break
                except APIConnectionError:
                    assert server.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.5)
            yield client
        finally:
            server.terminate()
            server.wait(60)
