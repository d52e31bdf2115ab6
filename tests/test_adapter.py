"""LoRA adapters as the fine-tuned side, against PEFT's own merging."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import Save, make_other, make_tokenizer
from deltacome import DeltacomeError, compress, merge
from deltacome.checkpoints.adapter import Adapted
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.format.artifact import Artifact
from test_exporting import logits, make


def make_adapter(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A random adapter of a base, and the weights that PEFT merges it to."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
        ("llama", {"alpha_pattern": {"down_proj": 9}, "modules_to_save": ["norm", "lm_head"]}),
        ("qwen2", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "bias": "none"}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_weights_are_those_that_peft_merges(family: str, options: dict[str, Any], save: Save, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": family == "gpt2"}
    base = save(make(family, **tied), "base", torch.float32)
    merged = make_adapter(base, tmp_path / "adapter", **options)
    adapted = Adapted(Checkpoint(base), tmp_path / "adapter")
    changed = 0
    for name in adapted.tensors:
        expected = merged.get(name, merged.get(f"transformer.{name}"))
        if expected is None and name.startswith("embed_out"):
            expected = merged["lm_head.weight"]
        assert expected is not None, name
        assert torch.allclose(adapted.read_float(name), expected, atol=1e-6)
        changed += not torch.equal(adapted.read(name), adapted.base.read(name))
    assert changed >= 4


def test_an_adapter_is_compressed_and_merged(save: Save, tmp_path: Path) -> None:
    base = save(make_other("llama", tie_word_embeddings=False), "base", torch.float32)
    merged = make_adapter(base, tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "left"}))
    report = compress(base, tmp_path / "adapter", tmp_path / "delta", method="low-rank", ratio=4)
    artifact = Artifact(tmp_path / "delta")
    changed = {name for name, entry in artifact.entries.items() if entry.factored}
    # Exact but for the components' scales in bfloat16.
    assert len(changed) == 4 and all(entry.error < 3e-3 for entry in artifact.entries.values() if entry.factored)
    assert {rank for name in changed for _, rank in artifact.entries[name].factored} == {4}  # it is exact
    assert report["artifact_ratio"] > 4 and "tokenizer_config.json" in artifact.files
    assert artifact.manifest["finetuned"]["name"] == "adapter"
    merge(base, tmp_path / "delta", tmp_path / "merged")
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected.load_state_dict(merged)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(found), logits(expected), atol=1e-3)


def test_tied_embeddings(save: Save, tmp_path: Path) -> None:
    from deltacome.restore.exporting import export
    from test_exporting import change_matrices

    finetuned = make("llama", tie_word_embeddings=True)
    change_matrices(finetuned, 1)
    base, theirs = save(make("llama", tie_word_embeddings=True), "base"), save(finetuned, "finetuned")
    compress(base, theirs, tmp_path / "delta", ratio=4)
    export(base, tmp_path / "delta", tmp_path / "adapter", dtype=torch.float32)
    adapted = Adapted(Checkpoint(base), tmp_path / "adapter")
    assert adapted.tensors.keys() == Checkpoint(base).tensors.keys()
    make_adapter(base, tmp_path / "other", target_modules=["lm_head"])
    with pytest.raises(DeltacomeError, match=r"changes lm_head.weight, which .* ties to its embedding, in another way"):
        Adapted(Checkpoint(base), tmp_path / "other")


def test_norms_of_an_adapter_are_not_folded(save: Save, tmp_path: Path) -> None:
    base = save(make_other("llama"), "base", torch.float32)
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(DeltacomeError, match="norms cannot be folded in"):
        compress(base, tmp_path / "adapter", tmp_path / "delta", fold_norms=True)


def set_in_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (set_in_config(peft_type="LOHA"), "an adapter of type LOHA; merge it with PEFT"),
        (set_in_config(use_dora=True), "an adapter with DoRA; merge it with PEFT"),
        (set_in_config(lora_alpha=None), "is no LoRA adapter's configuration"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no LoRA adapter's configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    ],
)
def test_bad_adapters(change: Callable[[Path], None], message: str, save: Save, tmp_path: Path) -> None:
    base = save(make_other("llama"), "base", torch.float32)
    make_adapter(base, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(DeltacomeError, match=message):
        compress(base, tmp_path / "adapter", tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_model(save: Save, tmp_path: Path) -> None:
    base = save(make_other("llama"), "base", torch.float32)
    make_adapter(base, tmp_path / "adapter")
    wider = save(make_other("llama", hidden_size=120), "wider")
    with pytest.raises(DeltacomeError, match=r"by 60 x 4 times 4 x 109, and it is .*; is it the adapter's base\?"):
        compress(wider, tmp_path / "adapter", tmp_path / "delta")
    shorter = save(make_other("llama", num_hidden_layers=1), "shorter")
    with pytest.raises(DeltacomeError, match=r"changes .*layers.1.* has not; is it the adapter's base\?"):
        compress(shorter, tmp_path / "adapter", tmp_path / "delta")
