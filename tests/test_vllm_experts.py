"""In vLLM, deltas of all that a mixture of experts has; skipped where vLLM is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Save, fine_tune
from deltacome import compress
from deltacome.runtime.kernels import reference
from deltacome.vllm import experts, internals, layers, manager
from vllm_models import Models, Served, make, make_prompts, manager_of, request, stop

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Its shared expert has a gate of its own.
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 72},
    # 17 experts make the router a matrix that is compressed.
    "qwen3_moe": {"num_experts": 17, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
}
SIZES["qwen2_moe"] |= {"shared_expert_intermediate_size": 104}
COMPILED = {"enforce_eager": False, "kernel_config": {"enable_jit_warmup": False}}


def is_expert(name: str) -> bool:
    return ".experts." in name


def is_elsewhere(name: str) -> bool:
    return not is_expert(name) and not name.endswith("gate.weight")  # whose values are exact, or those of routers


def add_partial(models: Models, save: Save, name: str, is_changed: Any, folder: Path, **sizes: Any) -> None:
    """A delta, and its model, that changes the parameters of some names alone."""
    family = models.family
    model, own = make(family, **sizes), make(family, **sizes)
    fine_tune(model, 7, size=0.2)
    plain = dict(own.named_parameters())
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if not is_changed(parameter):
                value.copy_(plain[parameter])
    models.deltas[name] = folder / name
    compress(models.base, save(model, f"finetuned-{name}", torch.float32), folder / name, ratio=4)
    models.add_model(name, models.deltas[name], folder)


def make_expert_adapter(models: Models, folder: Path) -> Path:
    """A PEFT adapter of the experts, and its merged model as `peft` among the models."""
    merged = AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32).eval()
    rank, tensors, generator = 4, {}, torch.Generator().manual_seed(9)
    for name, module in merged.named_modules():
        if not hasattr(module, "gate_up_proj") or module.gate_up_proj.ndim != 3:
            continue
        for expert in range(len(module.gate_up_proj)):
            gate, up = module.gate_up_proj.data[expert].chunk(2)
            for matrix, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", module.down_proj.data[expert])):
                m, n = weight.shape
                a, b = torch.randn(rank, n, generator=generator), 0.1 * torch.randn(m, rank, generator=generator)
                start = f"base_model.model.{name}.{expert}.{matrix}.lora_"
                tensors |= {f"{start}A.weight": a, f"{start}B.weight": b}
                weight += 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    models.models["peft"] = merged
    return folder


def log_probabilities(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize(
    "family, options, engine",
    [
        ("mixtral", {}, {}),
        ("qwen2_moe", {"method": "bitdelta"}, {}),
        ("qwen2_moe", {}, COMPILED),
        ("qwen3_moe", {"method": "delta-come", "scale": "minmax"}, {}),
        ("qwen3_moe", {}, COMPILED),
        ("olmoe", {}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("method", "")),
)
def test_a_mixed_batch_answers_as_the_merged_models(
    family: str,
    options: dict[str, Any],
    engine: dict[str, Any],
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = SIZES[family] | {"tie_word_embeddings": False}
    served = Served(save, tmp_path, family, options, engine, **sizes)
    try:
        names = ["a", "base", "b", "b", "a", "base"]
        served.check(names, make_prompts(len(names)))
        monkeypatch.setattr(experts, "PAIRS", 16)  # so that a step's are computed bit by bit
        served.check(names[::-1], make_prompts(len(names), seed=1))
    finally:
        stop(served.llm)


def test_experts_alone_and_all_but_experts(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SIZES["qwen3_moe"] | {"tie_word_embeddings": False}
    served = Served(save, tmp_path, "qwen3_moe", {}, {"max_loras": 4}, **sizes)
    try:
        add_partial(served, save, "experts", is_expert, tmp_path, **sizes)
        add_partial(served, save, "elsewhere", is_elsewhere, tmp_path, **sizes)
        served.deltas["peft"] = make_expert_adapter(served, tmp_path / "peft")
        names = ["experts", "base", "elsewhere", "peft", "a", "experts", "peft"]
        prompts = make_prompts(len(names))
        of_base = log_probabilities(served.models["base"], prompts[0])
        for name in ("experts", "elsewhere", "peft"):
            assert (log_probabilities(served.models[name], prompts[0]) - of_base).abs().max() > 0.5
        served.check(names, prompts)
        for module in manager_of(served.llm).modules.values():
            if isinstance(module, experts.Experts):
                monkeypatch.setattr(module, "obstacle", "because of a test")
        refusals = {
            "experts": r"experts\.\d+\.\w+\.weight is nothing that vLLM can change \(because of a test\); serve",
            "peft": r"peft changes model\.layers\.0\.mlp\.experts, which cannot be done here: because of a test",
        }
        for name, message in refusals.items():
            served.llm.llm_engine.remove_lora(request(name, served.deltas[name]).lora_int_id)
            with pytest.raises(Exception, match=message):
                served.llm.llm_engine.add_lora(request(name, served.deltas[name]))
        served.check(["elsewhere", "base"], make_prompts(2))
        monkeypatch.setattr(experts.Experts, "change", lambda *given: None)
        with pytest.raises(AssertionError):
            served.check(["a", "base"], make_prompts(2, seed=2))
    finally:
        stop(served.llm)


def test_cuda_graphs_have_no_experts_of_deltas(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layers that a graph would have, as in `test_vllm_engines`."""
    for module in (manager, layers):
        monkeypatch.setattr(module, "kernels_for", lambda device: reference)
    monkeypatch.setattr(internals, "graph_tokens", lambda config: 24)
    sizes = SIZES["qwen2_moe"] | {"tie_word_embeddings": False}
    served = Served(save, tmp_path, "qwen2_moe", {}, **sizes)
    try:
        add_partial(served, save, "elsewhere", is_elsewhere, tmp_path, **sizes)
        add_partial(served, save, "experts", is_expert, tmp_path, **sizes)
        served.deltas["peft"] = make_expert_adapter(served, tmp_path / "peft")
        refusals = {
            "experts": "CUDA graphs have no room for: experts are computed one after another; or start vLLM with",
            "peft": "cannot be done here: experts are computed one after another; start vLLM with --enforce-eager",
        }
        for name, message in refusals.items():
            with pytest.raises(Exception, match=message):
                served.llm.llm_engine.add_lora(request(name, served.deltas[name]))
        served.check(["elsewhere", "base", "elsewhere"], make_prompts(3))
    finally:
        stop(served.llm)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_two_ranks(family: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    sizes = SIZES[family] | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    served = Served(save, tmp_path, family, {}, {"tensor_parallel_size": 2}, tie_word_embeddings=False, **sizes)
    try:
        names = ["base", "a", "b", "a"]
        if family == "qwen3_moe":
            served.deltas["peft"] = make_expert_adapter(served, tmp_path / "peft")
            names.append("peft")
        served.check(names, make_prompts(len(names)))
    finally:
        stop(served.llm)
