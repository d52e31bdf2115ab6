"""Deltas as PEFT adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from conftest import Save, fine_tune, make_any, make_other
from deltacome import DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.format.artifact import Artifact
from deltacome.restore.exporting import export

IDS = torch.randint(2, 259, (3, 11), generator=torch.Generator().manual_seed(5))


def change_matrices(model: PreTrainedModel, seed: int) -> None:
    """Fine-tune, but for norms and biases, which LoRA cannot express."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fine_tune(model, seed, size=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(before[name])


def make(family: str, **options: Any) -> PreTrainedModel:
    if family != "gpt2":
        return make_other(family, **options)
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_embd": 60, "n_layer": 2, "n_head": 3, "n_positions": 512}
    return AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, **options))


def make_pair(save: Save, family: str, **options: Any) -> tuple[Path, Path]:
    finetuned = make(family, **options)
    change_matrices(finetuned, 1)
    return save(make(family, **options), "base"), save(finetuned, "finetuned")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come", "bitdelta"])
@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", False), ("gpt_neox", False), ("gpt2", True)])
def test_an_adapter_of_full_rank_is_the_delta(family: str, tied: bool, method: str, save: Save, tmp_path: Path) -> None:
    base, finetuned = make_pair(save, family, tie_word_embeddings=tied)
    compress(base, finetuned, tmp_path / "delta", ratio=4, method=method)
    report = export(base, tmp_path / "delta", tmp_path / "adapter", dtype=torch.float32)
    assert report["left_out"] == [] and report["capped"] == 0 and report["error"] < 1e-3
    merge(base, tmp_path / "delta", tmp_path / "merged", torch.float32)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    found = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    assert not torch.allclose(before, expected, atol=0.05 * float(expected.abs().max()))


def test_a_capped_rank_loses_what_the_report_says(save: Save, tmp_path: Path) -> None:
    base, finetuned = make_pair(save, "llama", tie_word_embeddings=False)
    compress(base, finetuned, tmp_path / "delta", ratio=4)
    reports = [
        export(base, tmp_path / "delta", tmp_path / f"adapter{rank}", max_rank=rank, dtype=torch.float32)
        for rank in (2, 8)
    ]
    assert reports[0]["error"] > reports[1]["error"] > 0.05 and reports[0]["rank"] == 2
    artifact, checkpoint = Artifact(tmp_path / "delta"), Checkpoint(base)
    tensors = load_file(tmp_path / "adapter2" / "adapter_model.safetensors")
    lost = size = 0.0
    for entry, terms in artifact.all_terms():
        if len(entry.shape) == 2:
            delta = rebuild(entry, terms, checkpoint) - checkpoint.read(entry.base or "").float()
            module = f"base_model.model.{entry.name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in tensors:
                product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            else:
                product = (tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]).T
            values = torch.linalg.svdvals(delta)
            assert torch.allclose((delta - product).square().sum(), values[2:].square().sum(), rtol=1e-3)
            lost, size = lost + float((delta - product).square().sum()), size + float(delta.square().sum())
    assert reports[0]["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert reports[0]["capped"] == sum(len(entry.shape) == 2 for entry in artifact.entries.values())


def test_what_lora_cannot_express_is_named(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", ratio=8)
    report = export(base, tmp_path / "delta", tmp_path / "adapter")
    assert len(report["left_out"]) == 5 and all("norm" in name for name in report["left_out"])
    compress(base, finetuned, tmp_path / "folded", ratio=8, fold_norms=True)
    assert len(export(base, tmp_path / "folded", tmp_path / "again")["left_out"]) < 5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Artifact(tmp_path / "delta").base_name
    with pytest.raises(DeltacomeError, match="exists already"):
        export(base, tmp_path / "delta", tmp_path / "adapter")
    with pytest.raises(DeltacomeError, match="fingerprint differs"):
        export(finetuned, tmp_path / "delta", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_experts_are_left_out_and_named(save: Save, tmp_path: Path) -> None:
    tuned = make_any("mixtral")
    fine_tune(tuned)
    base = save(make_any("mixtral"), "base")
    compress(base, save(tuned, "tuned"), tmp_path / "delta", ratio=4)
    left_out = export(base, tmp_path / "delta", tmp_path / "adapter")["left_out"]
    assert sum(".experts." in name for name in left_out) == 2 * 3 * 3
    assert sum(name.endswith("block_sparse_moe.gate.weight") for name in left_out) == 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]
