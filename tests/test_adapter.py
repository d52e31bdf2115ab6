"""LoRA adapters as the fine-tuned side, against PEFT's own merging."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import Save, make_other, make_tokenizer
from deltacome import DeltacomeError, compress, merge
from deltacome.checkpoints.adapter import Adapted, is_adapter
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.format.artifact import Artifact
from test_exporting import logits, make


def make_adapter(base: Path, folder: Path, safe: bool = True, **options: Any) -> dict[str, torch.Tensor]:
    """A random adapter of a base, and the weights that PEFT merges it to."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, safe_serialization=safe)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
        ("llama", {"alpha_pattern": {"down_proj": 9}, "modules_to_save": ["norm", "lm_head"]}),
        ("qwen2", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "bias": "none"}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
        ("gpt_neox", {"target_modules": ["dense", "dense_h_to_4h", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa", "use_dora": True}),
        ("llama", {"init_lora_weights": "pissa", "alpha_pattern": {"down_proj": 3}}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"init_lora_weights": "gaussian"}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        ("llama", {"init_lora_weights": "eva"}),
        ("llama", {"init_lora_weights": "mica"}),
        ("llama", {"init_lora_weights": False, "velora_config": VeloraConfig(num_groups=1)}),
        ("llama", {"use_dora": True}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [3, 258], "lm_head": [7]}}),
        ("llama", {"trainable_token_indices": [5, 0]}),
        ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"bias": "lora_only"}),
        ("qwen2", {"bias": "all"}),
        ("llama", {"safe": False, "exclude_modules": ["model.layers.1.mlp.down_proj"], "layers_to_transform": [1]}),
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
    assert changed >= (1 if "layers_to_transform" in options else 4)


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
    assert torch.allclose(logits(found), logits(expected), atol=2e-3)


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


@pytest.mark.parametrize(
    "options, changed",
    [
        ({"target_modules": ["embed_tokens"]}, None),  # PEFT computes with the base's head, and merges into both
        ({"modules_to_save": ["lm_head"]}, None),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 5),
        ({"trainable_token_indices": [5, 7]}, 5),
    ],
    ids=str,
)
def test_adapters_of_tied_embeddings(options: dict[str, Any], changed: int | None, save: Save, tmp_path: Path) -> None:
    base = save(make("llama", tie_word_embeddings=True), "base", torch.float32)
    merged = make_adapter(base, tmp_path / "adapter", **options)
    if changed is None:
        with pytest.raises(DeltacomeError, match=r"which .* ties to its (head|embedding), in another way"):
            Adapted(Checkpoint(base), tmp_path / "adapter")
        return
    adapted = Adapted(Checkpoint(base), tmp_path / "adapter")
    assert adapted.tensors.keys() == adapted.base.tensors.keys()
    assert all(torch.allclose(adapted.read_float(name), merged[name], atol=1e-6) for name in adapted.tensors)
    assert sum(not torch.equal(adapted.read(name), adapted.base.read(name)) for name in adapted.tensors) == changed


def test_a_converted_adapter_is_plain(save: Save, tmp_path: Path) -> None:
    """What PEFT makes of a PiSSA adapter with `path_initial_model_for_weight_conversion` is the same fine-tune."""
    base = save(make("llama"), "base", torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    config.init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    for name, parameter in adapted.named_parameters():
        parameter.data += 0.05 * ("lora_" in name)
    adapted.save_pretrained(tmp_path / "pissa")
    adapted.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"), safe_serialization=True
    )
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["init_lora_weights"] is True
    merged = adapted.merge_and_unload().state_dict()
    for folder in ("pissa", "plain"):
        found = Adapted(Checkpoint(base), tmp_path / folder)
        assert all(torch.allclose(found.read_float(name), merged[name], atol=1e-6) for name in found.tensors)


def test_layers_decide_whether_factors_are_transposed(save: Save, tmp_path: Path) -> None:
    base = save(make("llama"), "base", torch.float32)  # q_proj is square: its shape doesn't say
    merged = make_adapter(base, tmp_path / "adapter")
    set_in_config(fan_in_fan_out=True)(tmp_path / "adapter")
    found = Adapted(Checkpoint(base), tmp_path / "adapter")
    assert all(torch.allclose(found.read_float(name), merged[name], atol=1e-6) for name in found.tensors)


def test_an_adapter_beside_a_model(save: Save, tmp_path: Path) -> None:
    """`from_pretrained` puts the one on the other, on the base as on the fine-tune."""
    base = save(make("llama"), "base", torch.float32)
    make_adapter(base, tmp_path / "adapter")
    shutil.copy(base / "config.json", tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    shutil.copy(base / "model.safetensors", tmp_path / "adapter")
    assert not is_adapter(tmp_path / "adapter")
    for arguments in ((base, tmp_path / "adapter"), (tmp_path / "adapter", base)):
        with pytest.raises(DeltacomeError, match=r"holds a whole model and an adapter, .*; move the adapter into"):
            compress(*arguments, tmp_path / "delta")


def test_names_of_an_adapter_may_be_mapped(save: Save, tmp_path: Path) -> None:
    base = save(make("llama"), "base", torch.float32)
    merged = make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("self_attn", "attention"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(DeltacomeError, match=r"say how the names correspond to the base's \(--map\)"):
        Adapted(Checkpoint(base), tmp_path / "adapter")
    renames = {f"model.layers.{i}.attention.": f"model.layers.{i}.self_attn." for i in range(2)}
    options = {"method": "low-rank", "ratio": 4, "renames": renames}
    compress(base, tmp_path / "adapter", tmp_path / "delta", **options)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    found = Checkpoint(tmp_path / "merged")
    assert all(torch.allclose(found.read_float(name), merged[name], atol=1e-3) for name in found.tensors)


@pytest.mark.parametrize(
    "old, new",
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "module.base_model.model."),
        ("model.layers.", "model.language_model.layers."),  # as newer versions name what is `model.` in the base
    ],
)
def test_names_of_an_adapter_are_found(old: str, new: str, save: Save, tmp_path: Path) -> None:
    base = save(make("llama"), "base", torch.float32)
    merged = make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)
    found = Adapted(Checkpoint(base), tmp_path / "adapter")
    assert all(torch.allclose(found.read_float(name), merged[name], atol=1e-6) for name in found.tensors)


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
        (set_in_config(use_dora=True), "use_dora is not what .* has of it; it is broken"),
        (set_in_config(lora_bias=True), "lora_bias is not what .* has of it; it is broken"),
        (set_in_config(trainable_token_indices=[3]), "trainable_token_indices is not what .* has of it; it is broken"),
        *(
            (set_in_config(init_lora_weights=name), rf"its initialization \({name}\) changed .* path_initial_model_for")
            for name in ("pissa_niter_4", "corda", "loftq", "lora_ga", "of_a_newer_peft")
        ),
        *(
            (
                set_in_config(**{name: value}),
                f"an adapter with {name} in its adapter_config.json, .* merge it with PEFT",
            )
            for name, value in {
                "alora_invocation_tokens": [1, 2],
                "arrow_config": {"top_k": 3},
                "kasa_config": {"beta": 1},
                "layer_replication": [[0, 2], [1, 2]],
                "megatron_config": {"hidden_size": 60},
                "monteclora_config": {"num_samples": 8},
                "target_parameters": ["mlp.experts.gate_up_proj"],
                "use_bdlora": {"nblocks": 2},
                "use_qalora": True,
                "of_a_newer_peft": 0.5,
            }.items()
        ),
        (set_in_config(lora_alpha=None), "is no LoRA adapter's configuration"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no LoRA adapter's configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
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
