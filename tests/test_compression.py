import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from conftest import Save, files, fine_tune, make_model, make_tokenizer
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint


def change_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor of a saved checkpoint, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("ratio", [3.3, 4, 6])
def test_the_ratio_is_met_by_everything_on_disk(ratio: float, base: Path, finetuned: Path, tmp_path: Path) -> None:
    report = compress(base, finetuned, tmp_path / "delta", ratio=ratio)
    size = sum((tmp_path / "delta" / name).stat().st_size for name in ("deltacome.json", "delta.safetensors"))
    assert report["artifact_bytes"] == size and report["finetuned_bytes"] == 2 * Checkpoint(finetuned).elements
    # A component of these small matrices is some per cent of them; what the budget leaves over is less than one.
    assert ratio <= report["finetuned_bytes"] / size <= 1.25 * ratio


@pytest.fixture(scope="module")
def larger(save: Save) -> tuple[Path, Path]:
    """A base and a fine-tune with enough components to meet any ratio to a per cent."""
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = make_model(**sizes, **heads, tie_word_embeddings=True)
    base = save(model)
    fine_tune(model)
    return base, save(model)


@pytest.mark.parametrize("ratio", [8, 32, 128])
def test_the_ratio_is_met_to_a_per_cent(ratio: float, larger: tuple[Path, Path], tmp_path: Path) -> None:
    report = compress(*larger, tmp_path / "delta", ratio=ratio)
    assert 0.999 * ratio < report["artifact_ratio"] < 1.01 * ratio


def test_exact_embeddings_are_left_out_of_the_ratio(save: Save, tmp_path: Path) -> None:
    options = {"vocab_size": 5000, "intermediate_size": 500}
    model = make_model(**options)
    base = save(model)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=4, embeddings="exact")
    artifact, checkpoint = Artifact(tmp_path / "delta"), Checkpoint(finetuned)
    embeddings = [entry for name, entry in artifact.entries.items() if "embed" in name or "lm_head" in name]
    assert len(embeddings) == 2
    for entry in embeddings:
        assert torch.equal(artifact.terms(entry.name)[0].value, checkpoint.read(entry.name))  # type: ignore[union-attr]
    rest = 2 * sum(e.elements for e in artifact.entries.values() if e not in embeddings)
    assert 4 <= rest / (artifact.bytes - sum(e.bytes for e in embeddings)) < 4.6
    assert 4 < artifact.manifest["linear_ratio"] < 5.2


@pytest.mark.parametrize("grown", [1, 7])
def test_grown_vocabulary(grown: int, save: Save, tmp_path: Path) -> None:
    """Shared rows are a delta, new rows are exact, in the input embedding and in an untied head."""
    model = make_model()
    base = save(model)
    model.resize_token_embeddings(259 + grown, mean_resizing=False)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    ours, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(finetuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found, expected = ours.read(name), theirs.read(name)
        assert torch.equal(found[259:], expected[259:]) and not torch.equal(found, expected)
        assert (found[:259].float() - expected[:259].float()).norm() < 0.05 * expected.float().norm()
    assert ours.config["vocab_size"] == 259 + grown


@pytest.mark.parametrize("is_changed", [True, False])
def test_shrunk_vocabulary(is_changed: bool, save: Save, tmp_path: Path) -> None:
    """The base's last rows are padding, or tokens that the fine-tune has given up."""
    model = make_model()
    base = save(model)
    model.resize_token_embeddings(250)
    if is_changed:
        fine_tune(model)
    else:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    ours, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(finetuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found, expected = ours.read_float(name), theirs.read_float(name)
        assert found.shape == expected.shape == (250, 60)
        assert (found - expected).norm() < (0.05 * expected.norm() if is_changed else 1e-9)
    assert ours.config["vocab_size"] == 250


@pytest.mark.parametrize(("base_tied", "finetuned_tied"), [(True, False), (False, True)])
def test_embeddings_tied_in_one_only(base_tied: bool, finetuned_tied: bool, save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=base_tied))
    model = make_model(tie_word_embeddings=finetuned_tied)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    ours, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(finetuned)
    assert ours.tensors.keys() == theirs.tensors.keys() and ours.config == theirs.config
    for name in theirs.tensors:
        assert (ours.read(name).float() - theirs.read(name).float()).norm() < 0.05 * theirs.read(name).float().norm()


def test_unchanged_weights_cost_nothing(base: Path, save: Save, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01 * torch.randn(109, 60)
    compress(base, save(model), tmp_path / "delta", ratio=3)
    artifact = Artifact(tmp_path / "delta")
    changed = [name for name, entry in artifact.entries.items() if entry.tensors()]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(("base_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes(base_dtype: torch.dtype, dtype: torch.dtype, save: Save, tmp_path: Path) -> None:
    base = save(make_model(), dtype=base_dtype)
    model = make_model()
    fine_tune(model)
    finetuned = save(model, dtype=dtype)
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    assert {info.dtype for info in Checkpoint(tmp_path / "merged").tensors.values()} == {dtype}


def test_sharded_and_bin_checkpoints_give_the_same(base: Path, finetuned: Path, save: Save, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    fine_tune(model)
    sharded = save(model, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    binary = tmp_path / "binary"
    shutil.copytree(finetuned, binary)
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    results = []
    for number, folder in enumerate((finetuned, sharded, binary)):
        compress(base, folder, tmp_path / str(number), ratio=4)
        results.append((tmp_path / str(number) / "delta.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_a_pickle_that_runs_code_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(DeltacomeError, match="cannot be loaded as plain weights"):
        Checkpoint(folder)
    assert not (tmp_path / "owned").exists()


def test_sidecars_travel_only_where_they_differ(base: Path, finetuned: Path, tmp_path: Path) -> None:
    changed = tmp_path / "finetuned"
    shutil.copytree(finetuned, changed)
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    compress(base, changed, tmp_path / "delta", ratio=4)
    artifact = Artifact(tmp_path / "delta")
    assert (tmp_path / "delta" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "tokenizer.json" in artifact.base_files and not (tmp_path / "delta" / "tokenizer.json").exists()
    merge(base, tmp_path / "delta", tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in changed.iterdir()}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (changed / "tokenizer.json").read_bytes()


def test_odd_files_are_no_sidecars(base: Path, finetuned: Path, tmp_path: Path) -> None:
    changed = tmp_path / "finetuned"
    shutil.copytree(finetuned, changed)
    for name in ("._chat_template.jinja", "tokenizer copy.json", "tokenizer(1).json", "zero_to_fp32.py", "train.py"):
        (changed / name).write_text("left by somebody")
    (changed / "vocab.json").mkdir()
    (changed / "merges.txt").symlink_to("nowhere")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (changed / name).unlink(missing_ok=True)
        os.mkfifo(changed / name)
    settings = json.loads((changed / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.Own", "AutoModel": ["modeling_own.Own", None, "x/y--other.Own"]}
    (changed / "config.json").write_text(json.dumps({**settings, "auto_map": code}))
    for name, text in {"configuration_own": "", "modeling_own": "import os\nfrom .parts import a", "parts": ""}.items():
        (changed / f"{name}.py").write_text(text)
    compress(base, changed, tmp_path / "delta", ratio=4)
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {
        *("README.md", "delta.safetensors", "deltacome.json", "config.json"),
        *("configuration_own.py", "modeling_own.py", "parts.py"),
    }


def test_a_sidecar_that_cannot_be_read_is_found_out_before_the_work(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finetuned, tmp_path / "finetuned")
    broken = tmp_path / "finetuned" / "tokenizer.json"
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != broken)  # root may read everything
    monkeypatch.setattr("deltacome.compression.pipeline._make", None)  # never reached
    with pytest.raises(DeltacomeError, match=r"tokenizer\.json cannot be read; .* change its permissions"):
        compress(base, tmp_path / "finetuned", tmp_path / "delta", ratio=4)


class TestBadInput:
    """One sentence, and nothing left behind."""

    @pytest.fixture(autouse=True)
    def clean(self, tmp_path: Path) -> None:
        yield
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    @pytest.fixture
    def copy(self, finetuned: Path, tmp_path: Path) -> Path:
        shutil.copytree(finetuned, tmp_path / "copy")
        return tmp_path / "copy"

    def check_refused(self, message: str, base: Path, finetuned: Path, tmp_path: Path, **options: object) -> None:
        with pytest.raises(DeltacomeError, match=message):
            compress(base, finetuned, tmp_path / "out", **options)

    def test_missing_or_empty_folders(self, base: Path, copy: Path, tmp_path: Path) -> None:
        self.check_refused("there is no folder", tmp_path / "nothing", copy, tmp_path)
        (tmp_path / "empty").mkdir()
        self.check_refused("has no config.json", base, tmp_path / "empty", tmp_path)
        self.check_refused("is a file", base, copy / "config.json", tmp_path)
        (copy / "model.safetensors").unlink()
        self.check_refused("has no weights", base, copy, tmp_path)

    def test_broken_files(self, base: Path, copy: Path, tmp_path: Path) -> None:
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[:-10])
        self.check_refused("damaged", base, copy, tmp_path)
        (copy / "config.json").write_text("{")
        self.check_refused("not valid JSON", base, copy, tmp_path)

    def test_another_architecture(self, base: Path, copy: Path, tmp_path: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
        self.check_refused("is a qwen2 model and .* a llama model", base, copy, tmp_path)

    def test_other_shapes(self, save: Save, finetuned: Path, tmp_path: Path) -> None:
        self.check_refused("is this the right base", save(make_model(hidden_size=30)), finetuned, tmp_path)
        self.check_refused("cannot be the base", save(make_model(num_hidden_layers=3)), finetuned, tmp_path)

    def test_the_same_model(self, base: Path, tmp_path: Path) -> None:
        self.check_refused("is the same model", base, base, tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_nan_and_infinity(self, value: float, name: str, base: Path, copy: Path, tmp_path: Path) -> None:
        tensor = Checkpoint(copy).read(name).clone()
        tensor.view(-1)[3] = value
        change_tensor(copy, name, tensor)
        self.check_refused(f"{name} in .* holds NaN or infinity", base, copy, tmp_path)

    def test_ratios(self, base: Path, finetuned: Path, tmp_path: Path) -> None:
        for ratio in (1000, 1e9):
            self.check_refused("ratio of .* cannot be reached", base, finetuned, tmp_path, ratio=ratio)
        for ratio in (0, -3, float("nan")):
            self.check_refused("means nothing", base, finetuned, tmp_path, ratio=ratio)

    def test_plans(self, base: Path, finetuned: Path, tmp_path: Path) -> None:
        self.check_refused("asks for 60 components, and a matrix of", base, finetuned, tmp_path, precision="2:60")
        self.check_refused("not BITS:COUNT", base, finetuned, tmp_path, precision="8-2")

    def test_calibration_is_missing_or_wrong(self, base: Path, finetuned: Path, tmp_path: Path) -> None:
        self.check_refused("needs data", base, finetuned, tmp_path, method="bitdelta", scale="refit")
        self.check_refused("there is no file", base, finetuned, tmp_path, calibration=tmp_path / "none.jsonl")
        lines = tmp_path / "lines.jsonl"
        lines.write_text('{"text": "good"}\n{"prompt": 5}\n')
        self.check_refused("lines.jsonl, line 2", base, finetuned, tmp_path, calibration=lines)

    def test_no_parent_folder(self, base: Path, finetuned: Path, tmp_path: Path) -> None:
        with pytest.raises(DeltacomeError, match="create it first"):
            compress(base, finetuned, tmp_path / "no" / "out")


def test_a_full_disk(base: Path, finetuned: Path, tmp_path: Path) -> None:
    """The kernel refuses files above some size; on a full disk the same calls fail. What is finished is kept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (50, 2_000, 12_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DeltacomeError, match="cannot write"):
                compress(base, finetuned, tmp_path / "out", ratio=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (tmp_path / "out").exists()
    compress(base, finetuned, tmp_path / "out", ratio=2)
    compress(base, finetuned, tmp_path / "whole", ratio=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_an_existing_output_is_refused_and_kept(base: Path, finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(DeltacomeError, match="exists already"):
        compress(base, finetuned, out)
    assert (out / "mine").read_text() == "mine"


def test_a_delta_as_large_as_the_weights_is_warned_of(save: Save, tmp_path: Path) -> None:
    messages: list[str] = []
    compress(save(make_model(0)), save(make_model(1)), tmp_path / "delta", ratio=4, warn=messages.append)
    assert len(messages) == 1 and "1.4" in messages[0] and "right base?" in messages[0]


@pytest.mark.parametrize(("share", "is_told"), [(0.02, True), (0.2, False)])
def test_few_changes_are_told_of(share: float, is_told: bool, save: Save, tmp_path: Path) -> None:
    """Whoever changes few weights is told what --lossless would take, if that is less."""
    model = make_model(hidden_size=240, intermediate_size=512, tie_word_embeddings=True).bfloat16()
    base = save(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += (2.0**-7 * (torch.rand(weight.shape) < share) * weight).bfloat16()
    tuned = save(model)
    messages: list[str] = []
    compress(base, tuned, tmp_path / "delta", ratio=16, warn=messages.append)
    assert len(messages) == is_told
    if is_told:
        told = re.search(r"--lossless .* 1/(\d+) of", messages[0])
        kept = compress(base, tuned, tmp_path / "exact", method="lossless", warn=messages.append)
        assert told and float(told[1]) / 1.5 < kept["artifact_ratio"] < 1.5 * float(told[1])
        assert len(messages) == 1


def test_matrices_too_small_for_a_component_are_warned_of(base: Path, finetuned: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    compress(base, finetuned, tmp_path / "delta", ratio=12, method="delta-come", warn=messages.append)
    artifact = Artifact(tmp_path / "delta")
    dropped = [entry for entry in artifact.entries.values() if entry.error == 1]
    assert dropped and not any(entry.tensors() for entry in dropped)
    assert len(messages) == 1 and f"leaves {len(dropped)} of 15 matrices" in messages[0]


def test_tokenizer_fixture_is_a_real_one() -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hé"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def make_llava(base: PreTrainedModel) -> LlavaForConditionalGeneration:
    """A vision-language model whose language tower is a fine-tune of the base."""
    vision = CLIPVisionConfig(
        hidden_size=60, intermediate_size=109, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=base.config, image_token_index=258)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    fine_tune(model.model.language_model, size=0.1)
    return model


def test_a_vision_language_model_on_a_plain_base(save: Save, tmp_path: Path) -> None:
    plain = make_model(head_dim=20)
    base, tuned = save(plain, "base"), save(make_llava(plain), "llava")
    compress(base, tuned, tmp_path / "delta", ratio=2)
    entries = Artifact(tmp_path / "delta").entries
    paired = {entry.base for entry in entries.values() if entry.base is not None}
    assert paired == Checkpoint(base).tensors.keys()
    factored = [name for name, entry in entries.items() if entry.factored]
    assert len(factored) >= 15 and not any("vision" in name for name in factored)
    assert all(entry.dense == 0 for name, entry in entries.items() if "vision" in name or "projector" in name)
    merge(base, tmp_path / "delta", tmp_path / "merged", torch.float32)
    theirs = Checkpoint(tuned)
    for name in theirs.tensors:
        found, wanted = Checkpoint(tmp_path / "merged").read(name), theirs.read(name).float()
        assert float((found - wanted).norm()) <= 0.1 * float(wanted.norm())
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")


def test_renamed_weights(base: Path, finetuned: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuned, tmp_path / "renamed")
    tensors = load_file(finetuned / "model.safetensors")
    renamed = {name.replace("model.", "decoder.inner."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeltacomeError, match="cannot be the base of"):
        compress(base, tmp_path / "renamed", tmp_path / "delta", renames={"decoder.": "model."})
    compress(base, tmp_path / "renamed", tmp_path / "found", ratio=4)
    compress(base, tmp_path / "renamed", tmp_path / "delta", ratio=4, renames={"decoder.inner.": "model."})
    compress(base, finetuned, tmp_path / "plain", ratio=4)
    assert files(tmp_path / "found") == files(tmp_path / "delta")
    found, plain = (Artifact(tmp_path / name).entries for name in ("delta", "plain"))
    assert {entry.base for entry in found.values()} == plain.keys()
    assert sum(bool(entry.factored) for entry in found.values()) == sum(
        bool(entry.factored) for entry in plain.values()
    )


def test_another_kind_of_model_is_refused_unless_mapped(save: Save, finetuned: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuned, tmp_path / "other")
    config = json.loads((finetuned / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(DeltacomeError, match=r"is a mistral model and .* a llama model; .* \(--map\)"):
        compress(finetuned, tmp_path / "other", tmp_path / "delta")
