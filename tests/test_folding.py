import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from commands import fail, succeed
from conftest import Save, files, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.folding import Folded
from deltacome.evaluate.comparison import evaluate
from deltacome.outputs import work_folder
from test_compression import change_tensor

CLASSES = {
    "llama": (None, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}


def make_pair(save: Save, family: str, no_final_beta: bool = False, **options: object) -> tuple[Path, Path]:
    """A random model whose gains, betas and biases are random too, and its fine-tune, which changes all of them."""
    torch.manual_seed(0)
    options = {"max_position_embeddings": 512, "num_key_value_heads": 1, "intermediate_size": 109} | options
    config, architecture = CLASSES[family]
    if config is None:
        model = make_model(**options)
    else:
        if family == "gpt_neox":
            del options["num_key_value_heads"]
        sizes = {"vocab_size": 259, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 3}
        model = architecture(config(**sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=1, **options))

    def shake(size: float) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += size * torch.randn_like(parameter)
                if no_final_beta and name.endswith("final_layer_norm.bias"):
                    parameter.zero_()

    shake(0.1)
    base = save(model, "base")
    fine_tune(model)
    shake(0.02)
    return base, save(model, "finetuned")


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(ids).logits


def check_exact(base: Path, finetuned: Path) -> Folded:
    """The weights, folded in float64, give the fine-tuned model's logits behind the base's norms."""
    folded, theirs = Folded(Checkpoint(base), finetuned), Checkpoint(base)
    model = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float64)
    expected = logits(model)
    names = {"embed_out.weight": "lm_head.weight"}  # as transformers calls GPT-NeoX's head
    weights = {names.get(name, name): folded.read_as(name, torch.float64) for name in folded.tensors}
    model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)
    for name in {name for norm in folded.norms.values() for name in norm}:
        assert torch.equal(folded.read(name), theirs.read(name))
    return folded


@pytest.mark.parametrize(
    ("family", "options", "left"),
    [
        ("llama", {"tie_word_embeddings": True}, ["model.norm"]),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, []),
        ("mistral", {}, []),
        ("qwen2", {}, []),
        ("qwen3", {}, [f"model.layers.{i}.self_attn.{x}_norm" for i in range(2) for x in "qk"]),
        ("gpt_neox", {}, ["gpt_neox.final_layer_norm"]),
        ("gpt_neox", {"use_parallel_residual": False, "no_final_beta": True}, []),
        (
            "gpt_neox",
            {"attention_bias": False},
            ["gpt_neox.final_layer_norm", *(f"gpt_neox.layers.{i}.input_layernorm" for i in range(2))],
        ),
    ],
)
def test_folding_is_exact(family: str, options: dict, left: list[str], save: Save) -> None:
    """Whatever is left out of folding is the fine-tuned model's own."""
    base, finetuned = make_pair(save, family, **options)
    folded, ours = check_exact(base, finetuned), Checkpoint(finetuned)
    norms = {name.rpartition(".")[0] for name in ours.tensors if "norm" in name}
    assert norms - folded.norms.keys() == set(left)
    for name in ours.tensors:
        if name.rpartition(".")[0] in left:
            assert torch.equal(folded.read(name), ours.read(name))
    assert all(info.dtype == torch.bfloat16 or name in folded.shifts for name, info in folded.tensors.items())
    assert bool(folded.shifts) == (family == "gpt_neox")


@pytest.mark.parametrize("value", [0.0, 1e-4])
def test_a_gain_that_cannot_be_divided_by_leaves_its_norm(value: float, save: Save) -> None:
    base, finetuned = make_pair(save, "qwen2")
    name = "model.layers.1.input_layernorm.weight"
    gain = Checkpoint(base).read(name)
    gain[3] = value
    change_tensor(base, name, gain)
    folded = check_exact(base, finetuned)
    assert len(folded.norms) == 4 and "model.layers.1.input_layernorm" not in folded.norms


def test_names_without_the_models_prefix(save: Save) -> None:
    base, finetuned = make_pair(save, "llama", tie_word_embeddings=True)
    with_prefix = Folded(Checkpoint(base), finetuned)
    expected = {name.removeprefix("model."): with_prefix.read_float(name) for name in with_prefix.tensors}
    for folder in (base, finetuned):
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    folded = Folded(Checkpoint(base), finetuned)
    assert len(folded.norms) == len(with_prefix.norms) == 4
    assert all(torch.equal(folded.read_float(name), value) for name, value in expected.items())


def test_an_unchanged_norm_changes_no_weight(save: Save) -> None:
    base = save(make_model())
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight *= 1.5
    folded, ours = Folded(Checkpoint(base), save(model)), Checkpoint(base)
    changed = [name for name in ours.tensors if not torch.equal(ours.read(name), folded.read(name))]
    assert changed == [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up")]


def test_what_is_kept_exactly_stays_so(save: Save, tmp_path: Path) -> None:
    """An exact head and rows added to it would be rounded, so the norm before them is the fine-tuned one."""
    model = make_model()
    base = save(model)
    fine_tune(model)
    same = save(model)
    model.resize_token_embeddings(265, mean_resizing=False)
    grown = save(model)
    for name, finetuned, options in (("exact", same, {"embeddings": "exact"}), ("grown", grown, {})):
        report = compress(base, finetuned, tmp_path / name, ratio=3, fold_norms=True, **options)
        merge(base, tmp_path / name, tmp_path / f"{name}-merged")
        ours, theirs = Checkpoint(tmp_path / f"{name}-merged"), Checkpoint(finetuned)
        assert report["method"]["folded_norms"] == 4
        assert torch.equal(ours.read("model.norm.weight"), theirs.read("model.norm.weight"))
        rows = slice(0 if name == "exact" else 259, None)
        assert torch.equal(ours.read("lm_head.weight")[rows], theirs.read("lm_head.weight")[rows])


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(("method", "ratio", "error"), [("delta-come", 3, 0.3), ("low-rank", 0.45, 0.003)])
def test_the_artifact(
    family: str, method: str, ratio: float, error: float, save: Save, examples: Path, tmp_path: Path
) -> None:
    """It has nothing for the folded norms, and its model is near the fine-tuned one; the nearer, the larger it is."""
    base, finetuned = make_pair(save, family)
    delta = tmp_path / "delta"
    report = compress(base, finetuned, delta, ratio=ratio, method=method, fold_norms=True)
    artifact, folded = Artifact(delta), Folded(Checkpoint(base), finetuned)
    assert report["artifact_ratio"] >= ratio and report["finetuned_bytes"] == 2 * Checkpoint(finetuned).elements
    assert artifact.method["folded_norms"] == len(folded.norms) > 0
    assert not any(artifact.entries[name].tensors() for norm in folded.norms.values() for name in norm)
    assert all(artifact.entries[name].dtype == torch.float32 for name in folded.shifts)
    merge(base, delta, tmp_path / "merged", torch.float32)
    start, expected, ours = (
        logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        for folder in (base, finetuned, tmp_path / "merged")
    )
    assert (ours - expected).norm() < error * (start - expected).norm()
    rows = evaluate(base, finetuned, {"folded": delta}, examples, limit=2, new_tokens=2)
    assert rows[2]["on_task_kl"] < error * rows[0]["on_task_kl"]


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come"])
def test_calibration_goes_through_the_folded_model(method: str, save: Save, examples: Path, tmp_path: Path) -> None:
    base, finetuned = make_pair(save, "llama")
    compress(base, finetuned, tmp_path / "delta", ratio=3, method=method, calibration=examples, fold_norms=True)
    rows = evaluate(base, finetuned, {"folded": tmp_path / "delta"}, examples, limit=2, new_tokens=2)
    assert rows[2]["on_task_kl"] < 0.1 * rows[0]["on_task_kl"]


def test_a_killed_run_without_the_option_is_not_gone_on_with(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("deltacome.compression.pipeline.write_artifact", kill)
        compress(base, finetuned, tmp_path / "delta", ratio=4)
    assert len(list(work_folder(tmp_path / "delta").glob("*.safetensors"))) == 20
    compress(base, finetuned, tmp_path / "delta", ratio=4, fold_norms=True)
    compress(base, finetuned, tmp_path / "clean", ratio=4, fold_norms=True)
    assert files(tmp_path / "delta") == files(tmp_path / "clean")


def test_the_option(base: Path, finetuned: Path, tmp_path: Path) -> None:
    command = ("compress", base, finetuned, "--ratio", 4, "--fold-norms")
    report = json.loads(succeed(*command, "-o", tmp_path / "delta", "--json"))
    assert report["method"]["folded_norms"] == 4
    assert "folded_norms 4" in succeed("inspect", tmp_path / "delta")
    others = []
    for folder in (base, finetuned):
        others.append(tmp_path / folder.parent.name / folder.name)
        shutil.copytree(folder, others[-1])
        config = json.loads((folder / "config.json").read_text())
        (others[-1] / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    fail("is a gemma model; leave out --fold-norms", "compress", *others, "-o", tmp_path / "out", "--fold-norms")
    assert not (tmp_path / "out").exists()


def test_nan_is_named_where_it_is(save: Save, tmp_path: Path) -> None:
    base, finetuned = make_pair(save, "gpt_neox")
    for name in ("gpt_neox.layers.0.input_layernorm.bias", "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"):
        broken = tmp_path / name
        shutil.copytree(finetuned, broken)
        value = Checkpoint(broken).read(name)
        value.view(-1)[3] = float("nan")
        change_tensor(broken, name, value)
        with pytest.raises(DeltacomeError, match=f"{name} in .* holds NaN"):
            compress(base, broken, tmp_path / "out", fold_norms=True)
