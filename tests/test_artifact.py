import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltacome.files
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.compression.methods import rate_distortion
from deltacome.format import digests
from deltacome.format.manifest import (
    DIGEST_START,
    FORMAT_VERSION,
    MANIFEST,
    MODEL_CARD,
    MOST_BYTES,
    NO_DIGEST,
    SKETCH_VERSION,
    write_manifest,
)
from deltacome.restore.merging import load_merged, open_checked
from deltacome.runtime.tenant import check_config
from format_reader import Reader

SETTINGS = {
    "rate-distortion": {"ratio": 4},
    "classes of rows": {"ratio": 10},
    "a sketch": {"ratio": 8},
    "delta-come": {"method": "delta-come", "ratio": 4},
    "every bit-width": {"precision": "8:2,7:2,6:2,5:2,4:2,3:2,2:2,1:3"},
    "groups": {"method": "delta-come", "scale": "minmax", "ratio": 4},
    "small groups": {"method": "delta-come", "scale": "minmax", "group_size": 10, "ratio": 4},
    "low-rank": {"method": "low-rank", "ratio": 4},
    "bitdelta": {"method": "bitdelta"},
    "lossless": {"method": "lossless"},
    "exact embeddings": {"embeddings": "exact", "ratio": 4},
}


@pytest.fixture(scope="module")
def artifact(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "delta"
    compress(base, finetuned, out, ratio=4)
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_a_reader_written_from_the_specification_agrees(
    name: str, base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "classes of rows":
        monkeypatch.setattr(rate_distortion, "TALL", 2)
    if name == "a sketch":
        monkeypatch.setattr(rate_distortion, "FLAT", 0.0)
    compress(base, finetuned, tmp_path / "delta", **SETTINGS[name])
    artifact, checkpoint = Artifact(tmp_path / "delta"), Checkpoint(base)
    assert any(entry.rows for entry in artifact.entries.values()) == (name == "classes of rows")
    sketched = {entry.shape[0] < entry.shape[1] for entry in artifact.entries.values() if entry.sketched}
    assert sketched == ({True, False} if name == "a sketch" else set())  # on the left and on the right
    reader = Reader(tmp_path / "delta", base)
    assert reader.manifest["weights"].keys() == artifact.entries.keys() == Checkpoint(finetuned).tensors.keys()
    for weight, entry in artifact.entries.items():
        ours = rebuild(entry, artifact.terms(weight), checkpoint).double().numpy()
        np.testing.assert_allclose(ours, reader.weight(weight), rtol=1e-5, atol=1e-6)
    size = sum(path.stat().st_size for path in (tmp_path / "delta").glob("delta*"))
    assert artifact.bytes == size  # the weights and the manifest, by their names
    assert artifact.manifest["ratio"] == pytest.approx(artifact.finetuned_bytes / size, abs=2e-3)  # its digits count


@pytest.fixture
def stacks(base: Path, finetuned: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune with a stack of three matrices, one of them unchanged."""
    folders = []
    torch.manual_seed(0)
    stack = torch.randn(3, 40, 24)
    for source in (base, finetuned):
        shutil.copytree(source, tmp_path / f"stacked-{source.name}")
        path = tmp_path / f"stacked-{source.name}" / "model.safetensors"
        save_file({**load_file(path), "model.layers.1.mlp.experts.down_proj": stack}, path, {"format": "pt"})
        stack = stack + 0.05 * torch.randn(3, 40, 24) * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
        folders.append(path.parent)
    return folders[0], folders[1]


def test_a_stack_is_so_many_matrices(stacks: tuple[Path, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    base, finetuned = stacks
    compress(base, finetuned, tmp_path / "delta", ratio=2)
    artifact, reader = Artifact(tmp_path / "delta"), Reader(tmp_path / "delta", base)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    merged, before, after = (load_file(f / "model.safetensors")[name] for f in (tmp_path / "merged", *stacks))
    assert merged.shape == (3, 40, 24) and torch.equal(merged[1], before[1])
    for i in (0, 2):
        assert artifact.entries[f"{name}[{i}]"].factored
        assert 0 < float((merged[i] - after[i]).norm()) < 0.7 * float((after[i] - before[i]).norm())
        np.testing.assert_allclose(merged[i].numpy(), reader.weight(f"{name}[{i}]"), rtol=1e-5, atol=1e-6)
    binary = tmp_path / "binary"
    shutil.copytree(finetuned, binary)
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    compress(base, binary, tmp_path / "of-binary", ratio=2)
    weights = [(tmp_path / folder / "delta.safetensors").read_bytes() for folder in ("delta", "of-binary")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries, name: entries.update({f"{name}[5]": entries.pop(f"{name}[1]")}), "numbered from 0"),
        (lambda entries, name: entries.update({name: entries.pop(f"{name}[1]")}), "numbered from 0"),
        (lambda entries, name: entries[f"{name}[1]"].update(shape=[41, 24]), "differ in shape"),
    ],
)
def test_a_stack_with_a_gap_does_not_open(change: Any, message: str, stacks: Any, tmp_path: Path) -> None:
    compress(*stacks, tmp_path / "delta", ratio=2)
    manifest = json.loads((tmp_path / "delta" / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    change(manifest["weights"], "model.layers.1.mlp.experts.down_proj")
    write_manifest(tmp_path / "delta", manifest, 1)
    with pytest.raises(DeltacomeError, match=message):
        Artifact(tmp_path / "delta")


def test_exact_parts_are_exact(artifact: Path, base: Path, finetuned: Path) -> None:
    opened, base_checkpoint, checkpoint = Artifact(artifact), Checkpoint(base), Checkpoint(finetuned)
    norms = [name for name in opened.entries if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        found = rebuild(opened.entries[name], opened.terms(name), base_checkpoint)
        assert found.dtype == torch.bfloat16 and torch.equal(found, checkpoint.read(name))


def test_any_changed_byte_is_found(artifact: Path, tmp_path: Path) -> None:
    """Every byte of the manifest, and a byte in every 97 of the weights."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    names = [path.name for path in folder.iterdir() if path.name != MODEL_CARD]
    assert "deltacome.json" in names and "delta.safetensors" in names
    for name in names:
        content = (folder / name).read_bytes()
        step = 7 if name == MANIFEST else 97
        for place in [*range(100), *range(100, len(content), step), len(content) - 1]:
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            (folder / name).write_bytes(changed)
            with pytest.raises(DeltacomeError):
                Artifact(folder).check_digests()
        for shorter in (content[:-1], content[: len(content) // 2], content[:5], b"", content + b"\0"):
            (folder / name).write_bytes(shorter)
            with pytest.raises(DeltacomeError):
                Artifact(folder).check_digests()
        (folder / name).unlink()
        with pytest.raises(DeltacomeError):
            Artifact(folder).check_digests()
        (folder / name).write_bytes(content)
    Artifact(folder).check_digests()


def test_truncated_weights_do_not_open(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DeltacomeError, match="truncated or damaged"):
        Artifact(tmp_path / "copy")


def edit_entry(**fields: object) -> Callable[[dict], None]:
    def edit(manifest: dict) -> None:
        manifest["weights"]["model.layers.0.mlp.up_proj.weight"].update(fields)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edit_entry(shape=[109, 97]),
        edit_entry(shape=[109, -60]),
        edit_entry(shape="huge"),
        edit_entry(dtype="F17"),
        edit_entry(factored=[[9, 1]]),
        edit_entry(factored=[[2, 100]]),
        edit_entry(factored=[[2, 0]]),
        edit_entry(factored=[[2]]),
        edit_entry(group_size=-3),
        edit_entry(group_size=128),
        edit_entry(rotated="w"),
        edit_entry(rotated=3),
        edit_entry(sketched=True),
        edit_entry(sketched=1),
        edit_entry(factored=[], sketched=True),
        edit_entry(rows=50),
        edit_entry(rows="all"),
        edit_entry(rows=[[109, 1]]),
        edit_entry(rows=[[50, 1], [50, 0]]),
        edit_entry(rows=[[109, 1], [0, 0]]),
        edit_entry(rows=[[50, 0], [59, 9]]),
        edit_entry(rows=[[108, 0], [1, 1]]),
        edit_entry(rows=[[True, 1], [108, 0]]),
        edit_entry(rows=[[25, 1], [25, 0], [25, 0], [25, 0], [9, 0]]),
        edit_entry(sign=True),
        edit_entry(sign="yes"),
        edit_entry(dense=0),
        edit_entry(dense=109),
        edit_entry(shape=[True, 60]),
        edit_entry(shape=[2**60, 2**60]),
        edit_entry(shape=[2**40, 1], factored=None),
        edit_entry(factored=[[2.0, 1]]),
        edit_entry(factored=[[2, True]]),
        edit_entry(group_size=True),
        edit_entry(error="small"),
        edit_entry(base=5),
        edit_entry(base=None),
        lambda manifest: manifest.pop("weights"),
        lambda manifest: manifest.pop("base"),
        lambda manifest: manifest["weights"].pop("model.layers.0.mlp.up_proj.weight"),
        lambda manifest: manifest["weights"].update(extra={"shape": [2], "dtype": "F32", "dense": 0}),
        lambda manifest: manifest["files"].update({"../evil": "0" * 64}),
        lambda manifest: manifest["files"].update({"/etc/passwd": "0" * 64}),
        lambda manifest: manifest["base_files"].update({"..": "0" * 64}),
        lambda manifest: manifest["files"].update({"delta-2.safetensors": "0" * 64}),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(finetuned_bytes=True),
        lambda manifest: manifest.update(finetuned_bytes=-1),
        lambda manifest: manifest.update(linear_ratio=None),
        lambda manifest: manifest["method"].update(rescaled="0.99"),
        lambda manifest: manifest["method"].update(rescaled=0.0),
        lambda manifest: manifest["method"].update(name=5),
        lambda manifest: manifest.update(finetuned={}),
        lambda manifest: manifest["base"].update(name=None),
        lambda manifest: manifest["files"].update({"config.json": 5}),
        lambda manifest: manifest["files"].update({"x" * 300: "0" * 64}),
        lambda manifest: manifest["files"].update({"pytorch_model.bin": "0" * 64}),
        lambda manifest: manifest["files"].update({"adapter_config.json": "0" * 64}),
        lambda manifest: manifest["files"].update({"model.safetensors": "0" * 64}),
        lambda manifest: manifest["base_files"].update({"model.safetensors": "0" * 64}),
        lambda manifest: manifest["base_files"].update({"delta.safetensors": "0" * 64}),
        lambda manifest: manifest["base_files"].update({"model.safetensors.index.json": "0" * 64}),
        lambda manifest: manifest["base_files"].update({"deltacome.json": "0" * 64}),
        lambda manifest: manifest["weights"].update({"\x1b[2J": {"shape": [2], "dtype": "F32"}}),
    ],
)
def test_a_manifest_that_lies_does_not_open_even_with_a_right_digest(
    edit: Callable[[dict], None], artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    manifest = json.loads((artifact / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    edit(manifest)
    write_manifest(tmp_path / "copy", manifest, 1)
    with pytest.raises(DeltacomeError, match="broken artifact"):
        Artifact(tmp_path / "copy")


def hostile_manifest(text: str) -> bytes:
    """A manifest with a right digest around whatever text."""
    blank = DIGEST_START + NO_DIGEST.encode() + f'","format_version":{FORMAT_VERSION},{text}}}'.encode()
    return blank.replace(NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


HOSTILE_MANIFESTS = {
    "a text as ratio": hostile_manifest('"ratio":"much"'),
    "an infinite ratio": hostile_manifest('"ratio":1e999'),
    "infinite bytes": hostile_manifest(
        '"ratio":1.0,"method":{},"base":{"name":"x","fingerprint":"x"},"finetuned_bytes":1e999'
    ),
    "deep JSON": b'{"format_version":' + b"[" * 200_000,
    "a list": b"[3]",
    "no text": b"\xff\xfe",
    "more than it may be": b" " * (MOST_BYTES + 1),
}


@pytest.mark.parametrize("content", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DeltacomeError, match=f"{MANIFEST} is (damaged|not as)"):
        Artifact(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        b'"weights":{},',
        b'"extra":{"a":1,"a":2},',
        b'"extra":NaN,',
        b'"extra":-Infinity,',
        b'"extra":1e999,',
        b'"extra":"\\ud800",',
        b'"extra":"\xff",',
        b'"extra":' + b"[" * 100_000 + b"]" * 100_000 + b",",
        b'"extra":' + b"9" * 5000 + b",",
        b'"extra":"' + b"x" * 2**25 + b'",',
    ],
    ids=lambda extra: extra[:22].decode(errors="replace"),
)
def test_json_that_readers_may_take_in_two_ways_does_not_open(extra: bytes, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    rest = (artifact / MANIFEST).read_bytes()[len(DIGEST_START) + 66 :]
    text = DIGEST_START + NO_DIGEST.encode() + b'",' + extra + rest
    digest = hashlib.sha256(text).hexdigest().encode()
    (tmp_path / "copy" / MANIFEST).write_bytes(text.replace(NO_DIGEST.encode(), digest, 1))
    with pytest.raises(DeltacomeError, match="is not the JSON that was written"):
        Artifact(tmp_path / "copy")


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [60]},
        {"shape": [2**20, 2**20], "dtype": "BF16"},
        {"shape": [109, 61]},
        {"shape": [110, 60]},
        {"shape": [109, 60], "base": "no.such.weight"},
        {"shape": [109, 60], "base": "model.norm.weight"},
    ],
)
def test_an_entry_that_does_not_fit_the_base_is_refused_before_the_work(
    fields: dict[str, Any], artifact: Path, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    manifest = json.loads((artifact / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    manifest["weights"]["model.layers.7.mlp.up_proj.weight"] = {
        "dtype": "BF16",
        "base": "model.layers.0.mlp.up_proj.weight",
        **fields,
    }
    write_manifest(tmp_path / "copy", manifest, 1)
    with pytest.raises(DeltacomeError, match=r"layers\.7\.mlp\.up_proj\.weight has the shape .* does not fit"):
        open_checked(Checkpoint(base), tmp_path / "copy")


def test_a_file_is_read_once_until_it_is_written_again(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By device, inode, size and times; one that was written a moment ago is read again."""
    read: list[str] = []
    real = deltacome.files.sha256
    monkeypatch.setattr("deltacome.files.sha256", lambda path: (read.append(path.name), real(path))[1])
    monkeypatch.setattr(digests, "_known", {})
    shutil.copytree(artifact, tmp_path / "copy")
    opened = Artifact(tmp_path / "copy")
    opened.check_files()
    opened.check_files()
    assert read == 2 * list(opened.files)  # young
    monkeypatch.setattr(digests, "YOUNG_NS", -1)
    opened.check_files()
    read.clear()
    Artifact(tmp_path / "copy").check_files()
    assert read == []
    opened.check_digests()  # promises to read
    path = tmp_path / "copy" / "delta.safetensors"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the time of change tells
    with pytest.raises(DeltacomeError, match="SHA-256 differs"):
        opened.check_files()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_missing(make: Callable[[Path], None], artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / "delta.safetensors"
    path.unlink()
    make(path)
    with pytest.raises(DeltacomeError, match="is missing"):
        Artifact(tmp_path / "copy")


def test_other_format_versions_are_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    text = (artifact / MANIFEST).read_text()
    text = re.sub(r'"format_version":\d', f'"format_version":{SKETCH_VERSION + 1}', text)
    (tmp_path / "copy" / MANIFEST).write_text(text)
    message = f"version {SKETCH_VERSION + 1}, and this deltacome reads versions {FORMAT_VERSION} to {SKETCH_VERSION}"
    with pytest.raises(DeltacomeError, match=message):
        Artifact(tmp_path / "copy")


def test_nan_in_a_scale_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    tensors = load_file(artifact / "delta.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight.scales"][1] = float("nan")
    save_file(tensors, tmp_path / "copy" / "delta.safetensors")
    with pytest.raises(DeltacomeError, match="holds NaN or infinity"):
        Artifact(tmp_path / "copy").terms("model.layers.0.mlp.up_proj.weight")


def test_no_artifact(tmp_path: Path, base: Path) -> None:
    with pytest.raises(DeltacomeError, match="there is no folder"):
        Artifact(tmp_path / "nothing")
    with pytest.raises(DeltacomeError, match="is no compressed delta"):
        Artifact(base)


def test_the_model_card_names_the_base_and_may_be_edited(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    card = tmp_path / "copy" / MODEL_CARD
    assert 'base_model: "base' in card.read_text()
    card.write_text("mine")
    Artifact(tmp_path / "copy").check_digests()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"num_hidden_layers": []}', b'{"model_type": 5}'],
    ids=lambda content: content[:10].decode(errors="replace"),
)  # fmt: skip
def test_a_forged_configuration_is_refused_or_travels_as_it_is(
    content: bytes, artifact: Path, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_bytes(content)
    manifest = json.loads((artifact / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    manifest["base_files"].pop("config.json", None)
    manifest["files"]["config.json"] = hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path / "copy", manifest, 1)
    if content.startswith(b"{"):
        merge(base, tmp_path / "copy", tmp_path / "merged")
        opened, checkpoint = Artifact(tmp_path / "copy"), Checkpoint(base)
        with pytest.raises(DeltacomeError):
            check_config(opened, checkpoint)
            load_merged(checkpoint, opened)
    else:
        with pytest.raises(DeltacomeError, match=r"config\.json is broken"):
            merge(base, tmp_path / "copy", tmp_path / "merged")
        assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
