import json
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltacome
from commands import run, succeed
from conftest import Save, make_model
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.compression.methods.lossless import Lossless
from deltacome.files import raw, sha256
from deltacome.format import coding, entropy
from deltacome.format.manifest import MANIFEST, write_manifest
from deltacome.format.terms import Coded, Dense
from deltacome.restore.merging import load_merged, open_checked
from deltacome.runtime.tenant import check_config
from format_reader import Reader

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def with_odd_values(value: Tensor) -> Tensor:
    """NaN of several bits, infinities, zeros of both signs, the smallest and the largest numbers, in its first row."""
    kind = coding.INTEGERS[value.dtype.itemsize]
    limits = torch.finfo(value.dtype)
    odd = [0.0, -0.0, float("inf"), -float("inf"), limits.max, -limits.max, limits.tiny, limits.smallest_normal / 4]
    value = value.clone()
    value[0, : len(odd)] = torch.tensor(odd, dtype=torch.float64).to(value.dtype)
    bits = value.view(kind)
    bits[0, 8:14] = torch.tensor([-1, -2, -3, 0, 1, 2], dtype=kind) ^ torch.iinfo(kind).max * torch.tensor(
        [0, 0, 0, 1, 1, 1], dtype=kind
    )
    return value


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
@pytest.mark.parametrize("bits", [1, 7, 16, 33, 64])
def test_integers_come_back_in_about_their_entropy(size: int, bits: int) -> None:
    source = np.random.default_rng(size + bits)
    values = source.integers(0, 2**63, size, np.uint64, endpoint=True) * np.uint64(2) + source.integers(
        0, 2, size, np.uint64
    )
    values >>= np.uint64(64 - bits)
    contexts = source.integers(0, 3, size, np.uint8)
    frequencies = entropy.count_tokens(values, contexts, 4)
    assert set(frequencies.sum(1)) <= {0, 2**entropy.PRECISION}
    words = entropy.encode(values, contexts, frequencies)
    assert 16 * len(words) <= 1.02 * size * bits + 64
    assert np.array_equal(entropy.decode(words, contexts, frequencies), values)
    for wrong in (words[:-1], words[:1], np.append(words, np.uint16(0))):
        with pytest.raises(ValueError, match="too early, or too late"):
            entropy.decode(wrong, contexts, frequencies)


def test_rare_tokens_keep_a_frequency() -> None:
    """As many of them as there are, each once beside a token that has all the rest."""
    powers = [2**k for k in range(64)] + [3 * 2**k for k in range(63)] + [2**64 - 1]
    values = np.array(powers + [0] * 10**6, np.uint64)
    contexts = np.zeros(len(values), np.uint8)
    frequencies = entropy.count_tokens(values, contexts, 1)
    assert frequencies.sum() == 2**entropy.PRECISION
    assert np.array_equal(entropy.decode(entropy.encode(values, contexts, frequencies), contexts, frequencies), values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("base_dtype", [*FLOATS, torch.float8_e4m3fn])
def test_every_bit_comes_back(base_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "CHUNK", 1000)
    torch.manual_seed(0)
    base = torch.randn(40, 60)
    value = with_odd_values((base + 0.01 * torch.randn(40, 60)).to(dtype))
    base[3] = float("nan")
    for theirs in (base.to(base_dtype), torch.zeros(40, 60, dtype=base_dtype)):
        data, coded = coding.encode(value, theirs)
        assert coded == dtype
        assert raw(coding.decode(data, coded, theirs)) == raw(value)


@pytest.mark.parametrize("shape", [(50,), (20, 30), (3, 5, 7, 2), (1, 1), (70, 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = torch.randn(shape).bfloat16()
    value = base + 0.01 * torch.randn(shape).bfloat16()
    data, coded = coding.encode(value, base)
    decoded = coding.decode(data, coded, base)
    assert decoded.shape == value.shape and torch.equal(decoded, value)


def test_bfloat16_in_float32_is_coded_as_such() -> None:
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    value = with_odd_values((base + 0.01).bfloat16()).view(torch.int16)
    wide = (value.to(torch.int32) << 16).view(torch.float32)
    data, coded = coding.encode(wide, base)
    assert coded == torch.bfloat16 and len(data) < 64 * 64 * 2
    assert raw(coding.widened(coding.decode(data, coded, base), torch.float32)) == raw(wide)


def test_a_small_change_takes_less_where_the_base_is_large_and_nothing_where_it_is_none() -> None:
    torch.manual_seed(0)
    base = torch.randn(512, 512).bfloat16()
    value = (base.float() + 2e-3 * torch.randn(512, 512)).bfloat16()
    (term,) = Lossless().code(value, base)
    assert isinstance(term, Coded)
    assert len(term.data) < 0.22 * value.nbytes  # 0.25 without the contexts
    rows = torch.where(torch.arange(512)[:, None] % 16 == 0, value, base)
    (term,) = Lossless().code(rows, base)
    assert isinstance(term, Coded) and len(term.data) < 0.25 * 0.25 * value.nbytes
    assert Lossless().code(base.clone(), base) == []
    assert Lossless().code(base.float(), base) == []


def test_what_cannot_be_coded_is_exact() -> None:
    torch.manual_seed(0)
    noise = torch.randn(20, 30).bfloat16()
    for value, base in [
        (noise, None),
        (noise, torch.randint(0, 9, (20, 30))),
        (torch.randint(-(2**15), 2**15, (20, 30)).to(torch.int16).view(torch.bfloat16), noise),  # dearer coded
        (torch.arange(5), torch.arange(5) + 1),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor(2.0), torch.tensor(1.0)),
        ((noise + 1).to(torch.float8_e5m2), noise),
        (torch.empty(0, 4), None),
    ]:
        (term,) = Lossless().code(value, base)
        assert isinstance(term, Dense) and term.start == 0 and term.value is value
    zeros = torch.zeros(100).bfloat16()
    (term,) = Lossless().code(-zeros, zeros)  # equal, but in their bits
    assert isinstance(term, Coded) and raw(coding.decode(term.data, term.dtype, zeros)) == raw(-zeros)


def damaged(data: Tensor) -> list[Tensor]:
    """Bytes with one that is changed, each in turn, and with some cut off or put on."""
    found = [data[:-1], data[:40], data[:0], torch.cat([data, data[:1]])]
    for place in range(len(data)):
        changed = data.clone()
        changed[place] ^= 1 << place % 8
        found.append(changed)
    return found


def test_damaged_bits_are_refused_unless_they_give_the_weight() -> None:
    """Contexts may be shifted where all entries are in the same one as before."""
    torch.manual_seed(0)
    base = torch.randn(20, 40).bfloat16()
    value = base + 0.01 * torch.randn(20, 40).bfloat16()
    data, coded = coding.encode(value, base)
    refused = 0
    for wrong in damaged(data):
        try:
            assert torch.equal(coding.decode(wrong, coded, base), value)
        except ValueError:
            refused += 1
    assert refused >= len(data)
    with pytest.raises(ValueError, match=r"another weight|too early"):
        coding.decode(data, coded, base * 2)


def test_nothing_is_decompressed_beyond_what_it_may_be() -> None:
    base = torch.randn(20, 40).bfloat16()
    _, coded = coding.encode(base + 0.01, base)
    bomb = zlib.compress(bytes(2**28), 9)
    header = coding.HEADER.pack(len(bomb), 2, 0, 1, 8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="other sizes"):
            data = torch.frombuffer(bytearray(bytes(32) + header + bomb + bytes(4)), dtype=torch.uint8)
            coding.decode(data, coded, base)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def odd(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a fine-tune with whatever there may be in a checkpoint."""
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    before = load_file(base / "model.safetensors")
    before["model.steps"] = torch.arange(5)
    before["model.flags"] = torch.tensor([True, False])
    before["model.conv.weight"] = torch.randn(4, 3, 2, 2)
    before["model.scalar"] = torch.tensor(1.0)
    before["model.layers.1.mlp.experts.down_proj"] = torch.randn(3, 40, 24)
    after = {
        name: value + (0.01 * torch.randn(value.shape)).to(value.dtype) if value.is_floating_point() else value
        for name, value in before.items()
    }
    after["model.steps"] = before["model.steps"] + 1
    after["model.scalar"] = torch.tensor(float("nan"))
    after["model.norm.weight"] = before["model.norm.weight"]
    after["model.extra.weight"] = with_odd_values(torch.randn(20, 30))
    after["model.embed_tokens.weight"] = torch.cat([after["model.embed_tokens.weight"], torch.randn(3, 60).bfloat16()])
    after[WEIGHT] = with_odd_values(after[WEIGHT].float())
    for name, dtype in (("gate", torch.float16), ("down", torch.float32)):
        after[f"model.layers.0.mlp.{name}_proj.weight"] = after[f"model.layers.0.mlp.{name}_proj.weight"].to(dtype)
    for name, tensors in (("base", before), ("finetuned", after)):
        shutil.copytree(base, folder / name)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "finetuned" / "config.json").read_text())
    (folder / "finetuned" / "config.json").write_text(json.dumps({**config, "vocab_size": 262}))
    return folder / "base", folder / "finetuned"


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert raw(found[name]) == raw(value), name


def test_a_checkpoint_comes_back_whatever_is_in_it(odd: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = odd
    report = compress(base, finetuned, tmp_path / "delta", method="lossless")
    assert report["method"] == {"name": "lossless", "calibration_examples": 0}
    merge(base, tmp_path / "delta", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", finetuned)
    assert sha256(tmp_path / "merged" / "config.json") == sha256(finetuned / "config.json")
    succeed("verify", tmp_path / "delta", "--base", base)
    artifact, reader = Artifact(tmp_path / "delta"), Reader(tmp_path / "delta", base)
    assert not artifact.entries["model.norm.weight"].tensors()
    assert artifact.entries["model.embed_tokens.weight"].dense == 259
    kinds = {name: type(artifact.terms(name)[-1]) for name in ("model.steps", "model.extra.weight", "model.scalar")}
    assert set(kinds.values()) == {Dense}
    checkpoint = Checkpoint(finetuned)
    coded = [name for name, entry in artifact.entries.items() if entry.coded is not None]
    assert (
        len(coded) == len(artifact.entries) - 6
    )  # two buffers, a scalar, a norm and what the base lacks, and one more
    for name in coded:
        assert reader.bits(name) == bytes(raw(checkpoint.read(name)))


def test_float32_is_converted_afterwards(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    merge(base, tmp_path / "delta", tmp_path / "merged", torch.float32)
    expected = load_file(finetuned / "model.safetensors")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float())
    checkpoint = Checkpoint(base)
    model, _ = load_merged(checkpoint, open_checked(checkpoint, tmp_path / "delta"))
    assert torch.equal(model.get_parameter(WEIGHT), expected[WEIGHT].float())


def test_shards_heads_of_their_own_and_other_dtypes(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=True), "base", torch.float16)
    other = make_model(tie_word_embeddings=False)
    finetuned = save(other, "finetuned", torch.bfloat16, max_shard_size="60KB")
    assert len(list(finetuned.glob("*.safetensors"))) > 1
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    merge(base, tmp_path / "delta", tmp_path / "merged")
    checkpoint = Checkpoint(finetuned)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == checkpoint.tensors.keys() and "lm_head.weight" in merged
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16 and raw(value) == raw(checkpoint.read(name))


def test_a_smaller_vocabulary(base: Path, save: Save, tmp_path: Path) -> None:
    finetuned = save(make_model(seed=1, tie_word_embeddings=True, vocab_size=250), "smaller")
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    merge(base, tmp_path / "delta", tmp_path / "merged")
    assert_same_weights(tmp_path / "merged", finetuned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 16}, "a ratio of 16 cannot be reached with this method and plan"),
        ({"fold_norms": True}, "folding norms rounds weights, which method lossless does not"),
        ({"calibration": "examples.jsonl"}, "method lossless makes no use of data"),
        ({"precision": "8:2,2:*"}, "method lossless has no setting precision"),
    ],
)
def test_what_does_not_go_with_it(
    options: dict[str, Any], message: str, base: Path, finetuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeltacomeError, match=message):
        compress(base, finetuned, tmp_path / "delta", method="lossless", **options)
    assert not (tmp_path / "delta").exists()


def test_it_is_an_option_of_its_own(base: Path, finetuned: Path, tmp_path: Path) -> None:
    refused = run("compress", base, finetuned, "-o", tmp_path / "delta", "--lossless", "--method", "bitdelta")
    assert refused.returncode == 1 and "--lossless is a method of its own" in refused.stderr
    succeed("compress", base, finetuned, "-o", tmp_path / "delta", "--lossless")
    assert Artifact(tmp_path / "delta").method["name"] == "lossless"
    assert "bits" in succeed("inspect", tmp_path / "delta")


def test_it_is_merged_and_not_served(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    with pytest.raises(DeltacomeError, match="holds weights to the last bit, which cannot be served beside the base; "):
        deltacome.load(base, {"math": tmp_path / "delta"})
    with pytest.raises(DeltacomeError, match="merge it, or compress without --lossless"):
        check_config(Artifact(tmp_path / "delta"), Checkpoint(base))  # the server and vLLM ask here, too


def test_the_nearest_adapter_can_be_exported(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    report = deltacome.export(base, tmp_path / "delta", tmp_path / "adapter", max_rank=64)
    assert report["rank"] == 60 and report["error"] < 0.01


def forge(folder: Path, copy: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A copy of an artifact with changed entry and tensors, under right digests."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "delta.safetensors")
    manifest = json.loads((copy / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    change(manifest["weights"][WEIGHT], tensors)
    save_file(tensors, copy / "delta.safetensors")
    manifest["files"]["delta.safetensors"] = sha256(copy / "delta.safetensors")
    write_manifest(copy, manifest, 1)
    return copy


def test_forged_bits_are_refused_with_a_sentence(base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")

    def change(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{WEIGHT}.coded"][-1] ^= 1

    forged = forge(tmp_path / "delta", tmp_path / "forged", change)
    with pytest.raises(DeltacomeError, match=r"bits of .*up_proj\.weight cannot be rebuilt on .*; fetch or compress"):
        merge(base, forged, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    refused = run("verify", forged, "--base", base)
    assert refused.returncode == 1 and "cannot be rebuilt" in refused.stderr
    artifact = Artifact(forged)
    rebuild(artifact.entries["model.norm.weight"], artifact.terms("model.norm.weight"), Checkpoint(base))


@pytest.mark.parametrize(
    "fields",
    [
        {"coded": ["F16", 100]},
        {"coded": ["BF16", -1]},
        {"coded": ["BF16", True]},
        {"coded": ["BF16"]},
        {"coded": 7},
        {"coded": None},
        {"coded": [["BF16"], 100]},
        {"dense": 0},
        {"sign": True},
        {"factored": [[2, 1]]},
        {"dtype": "I16"},
        {"dtype": "F64"},
        {"shape": []},
        {"shape": [0, 60]},
        {"base": None},
    ],
)
def test_an_entry_that_lies_does_not_open(fields: dict[str, Any], base: Path, finetuned: Path, tmp_path: Path) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    forged = forge(tmp_path / "delta", tmp_path / "forged", lambda entry, tensors: entry.update(fields))
    with pytest.raises(DeltacomeError, match="broken artifact"):
        Artifact(forged)


@pytest.mark.parametrize("shape", [[110, 60], [109, 61], [2**30, 60]])
def test_a_shape_that_lies_is_refused_before_the_work(
    shape: list[int], base: Path, finetuned: Path, tmp_path: Path
) -> None:
    compress(base, finetuned, tmp_path / "delta", method="lossless")
    forged = forge(tmp_path / "delta", tmp_path / "forged", lambda entry, tensors: entry.update(shape=shape))
    with pytest.raises(DeltacomeError, match="does not fit"):
        open_checked(Checkpoint(base), forged)
