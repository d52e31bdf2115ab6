"""Which files of a folder are a checkpoint's weights, against transformers, and what names they have in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import Save, fine_tune, make_model
from deltacome import DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair

NORM = "model.norm.weight"


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    """A checkpoint whose every weight file is another's stale copy: the final norm says which has been read."""
    model = make_model()
    shutil.copytree(save(model), tmp_path / "model")
    sharded = save(model, max_shard_size="50KB")
    for number, path in enumerate(sharded.glob("model*")):
        shutil.copy(path, tmp_path / "model")
        assert number < 9
    for path in (tmp_path / "model").glob("model-*.safetensors"):
        tensors = load_file(path)
        save_file({name: t.fill_(2) if name == NORM else t for name, t in tensors.items()}, path, {"format": "pt"})
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    torch.save({**tensors, NORM: torch.full_like(tensors[NORM], 3)}, tmp_path / "model" / "pytorch_model.bin")
    torch.save({**tensors, NORM: torch.full_like(tensors[NORM], 4)}, tmp_path / "model" / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tmp_path / "model"


@pytest.mark.parametrize("removed, norm", [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_the_files_are_those_that_transformers_takes(
    removed: int, norm: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in order[:removed]:
        (folder / name).unlink()
    shutil.copy(folder / "pytorch_model-1.bin", folder / "pytorch_model.fp16.bin")  # a variant, which nobody asked for
    found = Checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert found.read(NORM).unique().tolist() == [norm]
    assert all(torch.equal(found.read(name), tensor) for name, tensor in model.state_dict().items())
    warnings = [line for line in capsys.readouterr().err.splitlines() if "the weights are read from" in line]
    assert len(warnings) == (removed < 3) and all(f"from {order[removed]}" in line for line in warnings)


def test_a_configuration_may_name_the_file(folder: Path, save: Save) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, NORM: torch.full_like(tensors[NORM], 7)}, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(Checkpoint(folder).read(NORM), model.model.norm.weight)
    (folder / "other.safetensors").unlink()
    with pytest.raises(DeltacomeError, match=r"lacks other.safetensors, which its config.json names"):
        Checkpoint(folder)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    tuned = make_model()
    fine_tune(tuned)
    base = save(tuned)
    compress(base, folder, folder / "delta", ratio=4)
    merge(base, folder / "delta", folder / "merged")
    AutoModelForCausalLM.from_pretrained(folder / "merged")


def only(name: str) -> Callable[[Path], None]:
    """Leave but one weight file, under a name."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "kept")
        for path in [*folder.glob("model*"), *folder.glob("pytorch*")]:
            path.unlink()
        (folder / "kept").rename(folder / name)

    return change


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, **changes}, folder / "model.safetensors", {"format": "pt"})

    return change


def of_another(folder: Path) -> None:
    """An index that is left from another checkpoint."""
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def old_format(folder: Path) -> None:
    only("x")(folder)
    torch.save({"x": torch.ones(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def inside(folder: Path) -> None:
    only("x")(folder)
    torch.save({"state_dict": {"x": torch.ones(3)}}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, message",
    [
        (only("model.fp16.safetensors"), "has no weights .*; model.fp16.safetensors is not where transformers looks"),
        (only("model-00001-of-00002.safetensors"), "holds 1 of 2 shards; download it again"),
        (
            remove("model.safetensors*", "pytorch*", "model-00002-*"),
            r"holds \d of \d shards; download it again",
        ),
        (of_another, r"names model.layers.7.mlp.up_proj.weight, which its files have not"),
        (rewrite(**{NORM: torch.ones(0)}), "model.norm.weight in .* is empty: DeepSpeed ZeRO-3 .*zero_to_fp32.py"),
        (old_format, "in the format that PyTorch had before 1.6; load it in PyTorch and save it as safetensors"),
        (inside, "does not hold tensors by name alone; save the model's state_dict"),
    ],
)
def test_files_that_are_no_whole_checkpoint(change: Callable[[Path], None], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(DeltacomeError, match=message):
        Checkpoint(folder)


def test_shards_without_an_index(folder: Path) -> None:
    remove("model.safetensors*", "pytorch*")(folder)
    assert Checkpoint(folder).read(NORM).unique().tolist() == [2]


def renamed(folder: Path, change: Callable[[str], str], **more: torch.Tensor) -> Path:
    """A checkpoint with other names for its weights, and more of them."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    return folder


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10),
    "model.layers.0.attn.bias": torch.ones(1, 1, 32, 32),
    "model.layers.0.attention.masked_bias": torch.tensor(-1e9),
    "v_head.summary.weight": torch.ones(1, 60),
    "v_head.summary.bias": torch.ones(1),
}


@pytest.mark.parametrize(
    "change, more",
    [
        (lambda name: f"module.{name}", {}),
        (lambda name: f"_orig_mod.{name}", {}),
        (lambda name: f"module._orig_mod.{name}", {}),
        (lambda name: name.replace(".mlp", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp"), {}),
        (lambda name: name, BUFFERS),
    ],
    ids=["module", "compiled", "both", "inside", "buffers"],
)
def test_names_are_those_of_the_model(
    change: Callable[[str], str], more: dict[str, torch.Tensor], save: Save, tmp_path: Path
) -> None:
    base, model = save(make_model()), make_model()
    fine_tune(model)
    plain, other = save(model), renamed(save(model), change, **more)
    assert Checkpoint(other).tensors.keys() == Checkpoint(plain).tensors.keys()
    compress(base, plain, tmp_path / "plain", ratio=4)
    compress(base, other, tmp_path / "other", ratio=4)
    compress(renamed(save(make_model()), change, **more), plain, tmp_path / "back", ratio=4)
    weights = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("plain", "other", "back")]
    assert weights[0] == weights[1] == weights[2]


def test_a_name_twice(save: Save) -> None:
    folder = renamed(save(make_model()), lambda name: name, **{f"module.{NORM}": torch.ones(60)})
    with pytest.raises(DeltacomeError, match=r"holds model\.norm\.weight twice, once as module\.model\.norm\.weight"):
        Checkpoint(folder)


def without_model(name: str) -> str:
    return name.removeprefix("model.")


def in_towers(name: str) -> str:
    """As newer versions name what older ones had in `model` and `visual`."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")


@pytest.mark.parametrize("change", [without_model, in_towers])
def test_other_beginnings_of_names_are_found(change: Callable[[str], str], save: Save, tmp_path: Path) -> None:
    def made(seed: int) -> Path:
        model = make_model()
        if seed:
            fine_tune(model, seed)
        tower = {f"visual.layers.{i}.mlp.up_proj.weight": torch.randn(60, 60) for i in range(2)}
        torch.manual_seed(seed)
        return renamed(save(model), lambda name: name, **tower)

    torch.manual_seed(0)
    first, second = made(0), made(1)
    plain = pair(Checkpoint(first), Checkpoint(second))
    for ours, theirs in ((first, renamed(made(1), change)), (renamed(made(0), change), second)):
        found = pair(Checkpoint(ours), Checkpoint(theirs))
        assert len(found) == len(plain) and all(p.base_name is not None and p.rows for p in found)
        assert all(change(p.base_name) == p.name or change(p.name) == p.base_name for p in found)


def test_names_that_do_not_correspond_are_named(save: Save) -> None:
    base, fewer = save(make_model(num_hidden_layers=2)), save(make_model(num_hidden_layers=1))
    moved = renamed(fewer, lambda name: name.replace("layers.0", "blocks.1"))
    with pytest.raises(DeltacomeError, match=r"cannot be the base of .* only the names differ, say how \(--map\)"):
        pair(Checkpoint(base), Checkpoint(moved))
    config = json.loads((base / "config.json").read_text())
    tower = {**config, "model_type": "llava", "text_config": config}
    (base / "config.json").write_text(json.dumps(tower))
    with pytest.raises(
        DeltacomeError, match=r"a language tower alone, .*; save the base's language tower as a checkpoint"
    ):
        pair(Checkpoint(base), Checkpoint(fewer))
