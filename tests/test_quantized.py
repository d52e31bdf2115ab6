"""Quantized checkpoints: bases in 4 bit and in fp8, and fine-tunes in fp8."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from conftest import Save, fine_tune, make_model, make_tokenizer
from deltacome import Artifact, DeltacomeError, compress, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.randint(2, 259, (4, 9), generator=torch.Generator().manual_seed(5))
BLOCK = 32
STORED: dict[str, Any] = {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}


def make() -> PreTrainedModel:
    return make_model(**SIZES)


def quantize(source: Path, out: Path, **options: Any) -> Path:
    """A checkpoint in 4 bit, saved by transformers."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


def to_fp8(folder: Path) -> Path:
    """Make a checkpoint one whose linear layers are in fp8 with a scale for each block."""
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            m, n = weight.shape
            blocks = weight.float().view(m // BLOCK, BLOCK, n // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view(m, n).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK])
    return folder


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def check(base: Path, delta: Path, out: Path, tolerance: float) -> None:
    """The merged checkpoint, and the base serving the delta, give the same logits; other than the base's."""
    merge(base, delta, out, dtype=torch.float32)
    assert "quantization_config" not in Checkpoint(out).config
    model = load(base, {"a": delta})
    alone = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found, plain, expected = model(IDS, tenants=["a", None, "a", None]).logits, model(IDS).logits, alone(IDS).logits
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=tolerance * float(expected.abs().max()))
    assert torch.allclose(found[[1, 3]], plain[[1, 3]], atol=1e-4 * float(plain.abs().max()))
    assert (plain - expected).abs().max() > 10 * tolerance * expected.abs().max()


@pytest.fixture
def pair(save: Save) -> tuple[Path, Path]:
    tuned = make()
    fine_tune(tuned, size=0.2)
    return save(make(), "base"), save(tuned, "finetuned")


@pytest.mark.parametrize("options", [{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {}, STORED])
def test_a_base_in_4_bit(options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, finetuned = pair
    base = quantize(plain, tmp_path / "base", **options)
    checkpoint, whole, tuned = Checkpoint(base), Checkpoint(plain), Checkpoint(finetuned)
    assert checkpoint.tensors.keys() == whole.tensors.keys() and checkpoint.elements == whole.elements
    lost = checkpoint.read_float(UP) - whole.read_float(UP)
    assert 0.02 < lost.norm() / whole.read_float(UP).norm() < 0.2
    compress(base, finetuned, tmp_path / "delta", ratio=2)
    # The delta is from the weights that are served, so it makes good what they have lost.
    merge(base, tmp_path / "delta", tmp_path / "merged", dtype=torch.float32)
    wanted = tuned.read_float(UP)
    left = (Checkpoint(tmp_path / "merged").read_float(UP) - wanted).norm()
    assert left < 0.7 * (wanted - checkpoint.read_float(UP)).norm()
    check(base, tmp_path / "delta", tmp_path / "again", tolerance=0.02)  # bitsandbytes computes in bfloat16
    with pytest.raises(DeltacomeError, match="is not the base of"):
        merge(plain, tmp_path / "delta", tmp_path / "wrong")


def test_a_base_in_fp8_and_a_fine_tune_in_fp8(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = to_fp8(pair[0]), pair[1]
    compress(base, finetuned, tmp_path / "delta", ratio=2)
    check(base, tmp_path / "delta", tmp_path / "merged", tolerance=1e-4)
    to_fp8(finetuned)
    compress(base, finetuned, tmp_path / "delta-of-fp8", ratio=2)
    check(base, tmp_path / "delta-of-fp8", tmp_path / "merged-of-fp8", tolerance=1e-4)
    assert {entry.dtype for entry in Artifact(tmp_path / "delta-of-fp8").entries.values()} == {torch.bfloat16}


FINER = "model.layers.0.self_attn.q_proj.weight"  # 64 x 64


def requantize(folder: Path, block: list[int] | None, scale: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Make a weight of a checkpoint in fp8 one that has these scales, and the only one; its values."""
    tensors = load_file(folder / "model.safetensors")
    values = tensors[FINER].float().clamp(-2, 2).to(torch.float8_e4m3fn)
    save_file({**tensors, FINER: values, f"{FINER}_scale_inv": scale}, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quant_method="fp8", weight_block_size=block, **settings)
    return values.float()


def test_the_scales_of_fp8_are_those_of_its_blocks(pair: tuple[Path, Path]) -> None:
    """Blocks at the edges are cut off: 64 rows are 48 and 16, not 32 and 32."""
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    values = requantize(pair[0], [48, 24], scale)
    expected = torch.empty(64, 64)
    for i in range(64):
        for j in range(64):
            expected[i, j] = values[i, j] * scale[i // 48, j // 24]
    assert torch.equal(Checkpoint(pair[0]).read_float(FINER), expected)
    values = requantize(pair[0], None, torch.tensor(3.0))
    assert torch.equal(Checkpoint(pair[0]).read_float(FINER), 3 * values)
    values = requantize(pair[0], [64, 32], torch.tensor([[126, 129]], dtype=torch.uint8), scale_fmt="ue8m0")
    expected = values * torch.tensor([0.5] * 32 + [4.0] * 32)
    assert torch.equal(Checkpoint(pair[0]).read_float(FINER), expected)


def test_a_stack_in_fp8(pair: tuple[Path, Path]) -> None:
    values = torch.randn(2, 64, 32).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 9.0).view(2, 2, 2)
    tensors = load_file(pair[0] / "model.safetensors")
    more = {"model.experts.down_proj": values, "model.experts.down_proj_scale_inv": scale}
    save_file({**tensors, **more}, pair[0] / "model.safetensors", {"format": "pt"})
    edit_config(pair[0], quant_method="fp8", weight_block_size=[32, 16])
    expected = values.float() * scale.repeat_interleave(32, dim=1).repeat_interleave(16, dim=2)
    found = Checkpoint(pair[0])
    assert not any("scale" in name for name in found.tensors)
    for expert in (0, 1):
        assert torch.equal(found.read_float(f"model.experts.down_proj[{expert}]"), expected[expert])


@pytest.mark.parametrize(
    "block, settings, message",
    [
        ([32, 32], {}, r"does not fit the weight .*: 2 x 3 for 64 x 64 float8_e4m3fn, where .* is \[32, 32\]"),
        (None, {}, "does not fit the weight .* where weight_block_size in config.json is None"),
        ([0, 32], {}, "not two sizes; it is broken"),
        ([48], {}, "not two sizes; it is broken"),
        ([48, 24], {"quant_method": "fbgemm_fp8"}, "are quantized by fbgemm_fp8"),
        ([48, 24], {"quant_method": "compressed-tensors"}, "are quantized by compressed-tensors"),
        ([48, 24], {"quant_method": None, "load_in_4bit": True}, "says that the weights are quantized .* and none is"),
    ],
)
def test_scales_that_mean_something_else(
    block: Any, settings: dict[str, Any], message: str, pair: tuple[Path, Path]
) -> None:
    requantize(pair[0], block, torch.ones(2, 3))
    edit_config(pair[0], **{"quant_method": "fp8", "weight_block_size": block, **settings})
    with pytest.raises(DeltacomeError, match=message):
        Checkpoint(pair[0])


def test_fp8_of_which_the_half_is_missing(pair: tuple[Path, Path]) -> None:
    requantize(pair[0], [48, 24], torch.ones(2, 3))
    config = json.loads((pair[0] / "config.json").read_text())
    del config["quantization_config"]
    (pair[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltacomeError, match="has no quantization_config that says what the scales mean"):
        Checkpoint(pair[0])
    edit_config(pair[0], quant_method="fp8", weight_block_size=[48, 24])
    tensors = load_file(pair[0] / "model.safetensors")
    del tensors[f"{FINER}_scale_inv"]
    save_file(tensors, pair[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeltacomeError, match=r"is in fp8 and there is no .*q_proj.weight_scale_inv"):
        Checkpoint(pair[0])


def test_fp8_without_scales(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = pair
    tensors = load_file(finetuned / "model.safetensors")
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    save_file(tensors, finetuned / "model.safetensors", {"format": "pt"})
    compress(base, finetuned, tmp_path / "delta", ratio=2)
    merge(base, tmp_path / "delta", tmp_path / "merged", dtype=torch.float32)
    assert Artifact(tmp_path / "delta").entries[UP].dtype == torch.float8_e4m3fn
    error = (Checkpoint(tmp_path / "merged").read_float(UP) - tensors[UP].float()).norm()
    assert error < 0.7 * (tensors[UP].float() - Checkpoint(base).read_float(UP)).norm()


@pytest.mark.parametrize("kind", ["4 bit", "fp8"])
def test_an_adapter_on_a_quantized_base(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = quantize(pair[0], tmp_path / "base") if kind == "4 bit" else to_fp8(pair[0])
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    compress(base, tmp_path / "adapter", tmp_path / "delta", ratio=2)
    changed = {name for name, entry in Artifact(tmp_path / "delta").entries.items() if entry.factored}
    assert {name.split(".")[-2] for name in changed} == {"up_proj", "q_proj"}  # nothing else, to the last bit
    merge(base, tmp_path / "delta", tmp_path / "merged", dtype=torch.float32)
    found = Checkpoint(tmp_path / "merged").read_float(UP) - Checkpoint(base).read_float(UP)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert (found - layer.get_delta_weight("default")).norm() < 0.1 * found.norm()


def test_other_quantizations_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = pair
    edit_config(base, quant_method="gptq", bits=4)
    with pytest.raises(DeltacomeError, match="are quantized by gptq, which deltacome does not read"):
        compress(base, finetuned, tmp_path / "delta")
    edit_config(base, quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(DeltacomeError, match="does not read; quantize them to 4 bit"):
        compress(base, finetuned, tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []


def test_scales_that_do_not_fit_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = to_fp8(pair[0]), pair[1]
    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP}_scale_inv"] = torch.ones(5, 2)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeltacomeError, match=r"up_proj\.weight_scale_inv does not fit"):
        compress(base, finetuned, tmp_path / "delta")


def test_bitsandbytes_is_asked_for(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantize(pair[0], tmp_path / "base")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # as if it were not installed
    with pytest.raises(DeltacomeError, match=r"pip install 'deltacome\[bitsandbytes\]'"):
        Checkpoint(base)
