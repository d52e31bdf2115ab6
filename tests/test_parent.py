"""Deltas on deltas: each rebuilt and served through its chain, flattened, and refused where a parent is not right."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import deltacome
from commands import fail, run, succeed
from conftest import Save, files, fine_tune, make_any, make_model
from deltacome import Artifact, DeltacomeError, compress, export, flatten, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.compression.methods import rate_distortion
from deltacome.evaluate.parts import evaluate_parts
from deltacome.format.lineage import MOST_PARENTS, find_lineage
from deltacome.format.manifest import CHILD_VERSION, FORMAT_VERSION, MANIFEST, SKETCH_VERSION, write_manifest
from deltacome.format.terms import Factored, add_terms
from deltacome.restore.merging import open_checked
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import pack_blocks
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Registry
from deltacome.vllm.changes import share
from format_reader import Reader
from tenants import IDS, merged

QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of small models are coded in classes of rows."""
    monkeypatch.setattr(rate_distortion, "TALL", 2)


def train_on(model: PreTrainedModel, seed: int, grow: int = 0) -> None:
    """The next version: a smaller change than the first, of all but the second layer's queries."""
    kept = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    if grow:
        model.resize_token_embeddings(grow, mean_resizing=False)
    fine_tune(model, seed, size=0.03)
    model.model.layers[1].self_attn.q_proj.weight.data = kept


class Chain:
    """A base, the versions of a fine-tune, and a delta on the one before for each."""

    def __init__(self, base: Path, versions: list[Path], folder: Path, **options: Any) -> None:
        self.base, self.versions, self.folder = base, versions, folder
        self.deltas = [folder / f"v{number}" for number in range(1, len(versions) + 1)]
        for number, (version, delta) in enumerate(zip(versions, self.deltas, strict=True)):
            parent = self.deltas[number - 1] if number else None
            compress(base, version, delta, parent=parent, **{"ratio": 4, **options})


def make_chain(save: Save, folder: Path, count: int = 2, grow: int = 0, tied: bool = True, **options: Any) -> Chain:
    model = make_model(tie_word_embeddings=tied)
    base = save(model, "base")
    if grow:
        model.resize_token_embeddings(262, mean_resizing=False)
    fine_tune(model, 1, size=0.1)
    model.model.layers[1].self_attn.q_proj.weight.data = make_model().model.layers[1].self_attn.q_proj.weight.data
    versions = [save(model, "v1")]
    for seed in range(2, count + 1):
        train_on(model, seed, grow)
        versions.append(save(model, f"v{seed}"))
    return Chain(base, versions, folder, **options)


@pytest.fixture(scope="module")
def chain(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Three versions, embeddings in classes of rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rate_distortion, "TALL", 2)
        yield make_chain(save, tmp_path_factory.mktemp("chain"), count=3)


def difference(delta: Path, base: Path, version: Path, only: str = "") -> float:
    """How far the weights that a delta gives are from a version's, Frobenius."""
    artifact, checkpoint, tuned = Artifact(delta), Checkpoint(base), Checkpoint(version)
    assert artifact.weights.keys() == tuned.tensors.keys()
    squares = 0.0
    for entry, terms in artifact.all_terms():
        if only in entry.name:
            squares += float((rebuild(entry, terms, checkpoint).float() - tuned.read_float(entry.name)).square().sum())
    return squares**0.5


def test_each_version_is_rebuilt_through_those_before(chain: Chain) -> None:
    before = difference(chain.deltas[0], chain.base, chain.versions[0])
    for number in (1, 2):
        version = chain.versions[number]
        found = difference(chain.deltas[number], chain.base, version)
        assert found < 0.5 * difference(chain.deltas[number - 1], chain.base, version)
        assert found < before  # what the parent has lost is part of what its child gets
    artifact = Artifact(chain.deltas[2])
    assert [part.folder.name for part in artifact.chain] == ["v3", "v2", "v1"]
    assert artifact.manifest["format_version"] == CHILD_VERSION
    assert artifact.manifest["parent"] == {"name": "v2", "sha256": Artifact(chain.deltas[1]).manifest["sha256"]}
    assert artifact.manifest["base"] == Artifact(chain.deltas[0]).manifest["base"]
    assert artifact.ratio > 3.9 and artifact.chain_bytes == sum(Artifact(delta).bytes for delta in chain.deltas)


def test_a_reader_written_from_the_specification_agrees(chain: Chain) -> None:
    artifact, checkpoint = Artifact(chain.deltas[2]), Checkpoint(chain.base)
    reader = Reader(chain.deltas[2], chain.base)
    assert artifact.entries[EMBEDDING].rows and Artifact(chain.deltas[1]).entries[EMBEDDING].rows
    for name, entry in artifact.weights.items():
        ours = rebuild(entry, artifact.terms(name), checkpoint).double().numpy()
        np.testing.assert_allclose(ours, reader.weight(name), rtol=1e-5, atol=1e-6)


def test_a_sketch_on_a_sketch(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_distortion, "FLAT", 0.0)
    chain = make_chain(save, tmp_path, count=2)
    artifact, reader = Artifact(chain.deltas[1]), Reader(chain.deltas[1], chain.base)
    assert artifact.parent is not None
    assert artifact.manifest["format_version"] == artifact.parent.manifest["format_version"] == SKETCH_VERSION
    assert any(entry.factored and artifact.parent.entries[name].sketched for name, entry in artifact.entries.items())
    for name, entry in artifact.weights.items():
        ours = rebuild(entry, artifact.terms(name), Checkpoint(chain.base)).double().numpy()
        np.testing.assert_allclose(ours, reader.weight(name), rtol=1e-5, atol=1e-6)


def test_what_stays_costs_nothing(chain: Chain) -> None:
    for delta in chain.deltas:
        entry = Artifact(delta).entries["model.layers.1.self_attn.q_proj.weight"]
        assert not entry.tensors()
    again = chain.folder / "again"
    with pytest.raises(DeltacomeError, match="cannot be reached"):
        compress(chain.base, chain.versions[0], again, parent=chain.deltas[0], ratio=1e6)
    compress(chain.base, chain.versions[0], again, parent=chain.deltas[0], ratio=8)
    opened = Artifact(again)
    norms = [entry for name, entry in opened.entries.items() if "norm" in name]
    assert len(norms) == 5 and not any(entry.tensors() for entry in norms)
    assert set(opened.files) == {"delta.safetensors"}
    for name in norms:
        assert (
            rebuild(opened.weights[name.name], opened.terms(name.name), Checkpoint(chain.base)).dtype == torch.bfloat16
        )


def test_what_is_the_base_again_is_exactly_that(save: Save, tmp_path: Path) -> None:
    chain = make_chain(save, tmp_path, count=1)
    model = make_model(tie_word_embeddings=True)
    fine_tune(model, 1, size=0.1)
    model.model.norm.weight.data = make_model().model.norm.weight.data
    compress(chain.base, save(model), tmp_path / "v2", parent=chain.deltas[0], ratio=4)
    artifact, checkpoint = Artifact(tmp_path / "v2"), Checkpoint(chain.base)
    name = "model.norm.weight"
    rebuilt = rebuild(artifact.weights[name], artifact.terms(name), checkpoint)
    assert torch.equal(rebuilt, checkpoint.read(name)) and not torch.equal(
        rebuilt, Artifact(chain.deltas[0]).terms(name)[0].value
    )


@pytest.mark.parametrize("grow", [262, 265])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("in_classes", [True, False])
def test_grown_vocabulary(
    grow: int, tied: bool, in_classes: bool, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the parent, and in the child once more."""
    if in_classes:
        monkeypatch.setattr(rate_distortion, "TALL", 2)
    chain = make_chain(save, tmp_path, grow=grow, tied=tied)
    delta = chain.deltas[1]
    artifact, checkpoint, tuned = open_checked(Checkpoint(chain.base), delta), Checkpoint(chain.base), None
    tuned = Checkpoint(chain.versions[1])
    for name in (EMBEDDING,) if tied else (EMBEDDING, "lm_head.weight"):
        rebuilt = rebuild(artifact.weights[name], artifact.terms(name), checkpoint)
        assert rebuilt.shape == (grow, 60) and torch.equal(rebuilt[259:], tuned.read_float(name)[259:])
        np.testing.assert_allclose(rebuilt.double().numpy(), Reader(delta, chain.base).weight(name), atol=1e-6)
    assert_served(chain, tmp_path, grow)


def assert_served(chain: Chain, tmp_path: Path, vocabulary: int = 259) -> None:
    """Each version beside the others and the base, in one batch, as its merged model is."""
    names = [delta.name for delta in chain.deltas]
    model = load(chain.base, {delta.name: delta for delta in chain.deltas})
    ids = IDS[: len(names) + 1].clone()
    ids[len(names) - 1, 3] = vocabulary - 1
    with torch.no_grad():
        for length in (1, 9):  # one token each goes another way through the kernel
            logits = model(ids[:, -length:], tenants=[*names, None]).logits
            for row, delta in enumerate(chain.deltas):
                out = tmp_path / f"merged-{delta.name}-{length}"
                alone = merged(chain.base, delta, out)(ids[row : row + 1, -length:]).logits[0]
                found = logits[row, :, : alone.shape[1]]
                assert torch.allclose(found, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert (logits[0] - logits[1])[:, :259].abs().max() > 0.01


def test_served_beside_its_parents(chain: Chain, tmp_path: Path) -> None:
    assert_served(chain, tmp_path)


@pytest.mark.parametrize("first", ["delta-come", "low-rank", "rate-distortion"])
def test_parents_by_other_methods(first: str, save: Save, tmp_path: Path, classes: None) -> None:
    """Whose vectors are rotated otherwise, so that two deltas add to the same outputs."""
    chain = make_chain(save, tmp_path, count=1, method=first)
    second = "delta-come" if first == "rate-distortion" else "rate-distortion"
    model = make_model(tie_word_embeddings=True)
    fine_tune(model, 1, size=0.1)
    train_on(model, 2)
    compress(chain.base, save(model), tmp_path / "v2", parent=chain.deltas[0], ratio=4, method=second)
    chain.deltas.append(tmp_path / "v2")
    model = load(chain.base, {"v2": tmp_path / "v2"})
    packed = model.deltas["v2"].changes["model.layers.0.self_attn.q_proj"].packed
    assert [own.turn for own in packed] == ([0] if {first, second} == {"delta-come", "low-rank"} else [0, 1])
    assert_served(chain, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral", "gpt_oss"])
def test_biases_transposed_weights_and_experts(family: str, save: Save, tmp_path: Path) -> None:
    model = make_any(family)
    versions = []
    base = save(model, "base")
    for seed in (1, 2):
        fine_tune(model, seed, size=0.1)
        versions.append(save(model, f"v{seed}"))
    assert_served(Chain(base, versions, tmp_path), tmp_path)


def test_with_the_kernels_of_a_gpu(save: Save, tmp_path: Path, classes: None, gpu_kernels: Any) -> None:
    """In Triton's interpreter: rows in classes and none, rotated and not."""
    model = make_model(tie_word_embeddings=True, num_hidden_layers=1)
    base, folders = save(model, "base"), [tmp_path / "v1", tmp_path / "v2"]
    for seed, method in ((1, "rate-distortion"), (2, "delta-come")):
        fine_tune(model, seed, size=0.1)
        compress(
            base,
            save(model),
            folders[seed - 1],
            parent=folders[0] if seed == 2 else None,
            ratio=8,
            method=method,
        )
    served = load(base, {"v2": folders[1]})
    with torch.no_grad():
        logits = served(IDS[:2, :2], tenants=["v2", None]).logits[0]
        alone = merged(base, folders[1], tmp_path / "merged")(IDS[:1, :2]).logits[0]
    assert torch.allclose(logits, alone, atol=1e-3 * float(alone.abs().max()))


@pytest.mark.parametrize("size", [1, 3])
def test_shares_of_several_gpus_add_up(chain: Chain, size: int) -> None:
    """As the plugin for vLLM cuts them."""
    for entry, terms in Artifact(chain.deltas[2]).all_terms():
        if not any(isinstance(term, Factored) for term in terms):
            continue
        m, n = entry.shape
        whole = add_terms(torch.zeros(m, n), terms)
        x, product = torch.randn(3, n), torch.zeros(3, m)
        for rank in range(size):
            blocks = pack_blocks(share(terms, rank, size), (m, n), torch.device("cpu"))
            reference.Work([(block, torch.arange(3)) for block in blocks]).add(product, x)
        assert torch.allclose(product, x @ whole.T, atol=1e-4 * float(whole.abs().max()) * n)
        if entry.name == EMBEDDING and size == 1:
            assert [block.turn for block in blocks] == [0] * 4 + [1] * 4 + [2] * 4


def test_commands(chain: Chain, tmp_path: Path) -> None:
    base, delta = chain.base, chain.deltas[1]
    report = json.loads(succeed("verify", delta, "--json"))
    assert report["files"] == sum(len(part.files) + 1 for part in Artifact(delta).chain)
    assert "is its base" in succeed("verify", delta, "--base", base)
    shown = json.loads(succeed("inspect", delta, "--json"))
    assert shown["parent"] == "v1" and shown["chain_bytes"] == sum(Artifact(d).bytes for d in chain.deltas[:2])
    assert shown["chain_ratio"] == pytest.approx(shown["finetuned_bytes"] / shown["chain_bytes"], abs=1e-3)
    assert "on the delta v1; all together" in succeed("inspect", delta, "--plot", tmp_path / "plot.png")
    assert "parent" not in json.loads(succeed("inspect", chain.deltas[0], "--json"))
    assert "a delta on the delta `v1`" in (delta / "README.md").read_text()
    report = export(base, delta, tmp_path / "lora", max_rank=60)
    names = {name.partition(".lora")[0] for name in load_file(tmp_path / "lora" / "adapter_model.safetensors")}
    assert len(names) == 2 + 7 * 2 - 1 and report["error"] < 0.01
    assert succeed("generate", base, "--delta", f"a={delta}", "--prompt", "Hello", "--max-new-tokens", 2)


def test_pushed_by_itself(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr("deltacome.hub.push", lambda *arguments, **_: pushed.append(arguments))
    result = run("push", chain.deltas[1], "someone/v2")
    assert result.returncode == 0 and "it is a delta on v1, which is no hub id" in result.stderr
    assert pushed[0][0] == chain.deltas[1] and "delta.safetensors" in pushed[0][1]


def test_what_each_part_costs(chain: Chain, examples: Path) -> None:
    """All of what is rebuilt counts, also what the parent alone has changed."""
    rows = evaluate_parts(chain.base, chain.versions[1], {"v2": chain.deltas[1]}, examples, limit=3)
    assert [row["part"] for row in rows][:2] == ["all", "embeddings"]
    exact = next(row for row in rows if row["part"] == "exact")
    assert rows[0]["bytes"] + exact["bytes"] == pytest.approx(Artifact(chain.deltas[1]).bytes, rel=0.1)


@pytest.fixture
def copies(chain: Chain, tmp_path: Path) -> Path:
    """The deltas of the chain, to be tampered with."""
    for delta in chain.deltas:
        shutil.copytree(delta, tmp_path / "copies" / delta.name)
    return tmp_path / "copies"


def forge(folder: Path, **fields: Any) -> str:
    """Another manifest, rightly signed; its digest."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    manifest.update(fields)
    write_manifest(folder, {key: value for key, value in manifest.items() if value is not None}, 1)
    return str(json.loads((folder / MANIFEST).read_bytes())["sha256"])


def test_a_parent_that_is_not_there(copies: Path, chain: Chain) -> None:
    shutil.rmtree(copies / "v1")
    message = f"{copies / 'v2'} is a delta on the delta v1, and there is no such delta beside it; put that one into"
    for arguments in (["verify"], ["inspect"]):
        fail(message, *arguments, copies / "v3")
    for arguments in (["merge", "-o", copies / "out"], ["export", "-o", copies / "out"]):
        fail(message, arguments[0], chain.base, copies / "v3", *arguments[1:])
    assert {path.name for path in copies.iterdir()} == {"v2", "v3"}
    shutil.copytree(chain.deltas[1], copies / "v1")
    fail("v1 is not the one that it was made on (its manifest's SHA-256 differs)", "verify", copies / "v3")


def test_a_parent_on_the_hub(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copies)
    digest = Artifact(copies / "v1").manifest["sha256"]
    forge(copies / "v2", parent={"name": "someone/v1", "sha256": digest})
    assert Artifact(copies / "v2").parent is not None  # beside it
    (copies / "v1").rename(copies / "elsewhere")
    with pytest.raises(DeltacomeError, match="v2 is a delta on the delta someone/v1, which is not beside it as v1: "):
        Artifact(Path("..") / "copies" / "v2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(copies / "elsewhere"))
    assert Artifact(copies / "v2").chain[1].folder == copies / "elsewhere"


def test_a_damaged_parent(copies: Path, chain: Chain) -> None:
    weights = copies / "v1" / "delta.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = "v1 is a broken artifact: delta.safetensors is not the file that was written"
    fail(message, "verify", copies / "v3")
    fail(message, "merge", chain.base, copies / "v3", "-o", copies / "out")
    fail(message, "compress", chain.base, chain.versions[2], "--parent", copies / "v2", "-o", copies / "out")
    weights.write_bytes(content[:-5])
    fail("v1 is a broken artifact: delta.safetensors is truncated", "verify", copies / "v3")


def test_a_delta_is_not_its_own_ancestor(copies: Path) -> None:
    """A manifest cannot hold a digest that depends on its own."""
    digest = forge(copies / "v1", format_version=CHILD_VERSION, parent={"name": "v3", "sha256": "0" * 64})
    forge(copies / "v2", parent={"name": "v1", "sha256": digest})
    fail("v3 is not the one that it was made on", "verify", copies / "v2")
    forge(copies / "v1", parent={"name": "v1", "sha256": digest})
    fail("v1 is not the one that it was made on", "verify", copies / "v1")


def test_too_many_parents(copies: Path, monkeypatch: pytest.MonkeyPatch, chain: Chain) -> None:
    monkeypatch.setattr("deltacome.format.lineage.MOST_PARENTS", 1)
    fail("v3 is under more than 1 other deltas; flatten one of them", "verify", copies / "v3")
    monkeypatch.setattr("deltacome.compression.opening.MOST_PARENTS", 1)
    arguments = ("--parent", copies / "v2", "-o", copies / "out")
    fail("v2 is under 1 other deltas already; flatten it first", "compress", chain.base, chain.versions[2], *arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"format_version": FORMAT_VERSION},
        {"parent": None},
        {"parent": "v1"},
        {"parent": {"name": "v1"}},
        {"parent": {"name": 5, "sha256": "0" * 64}},
        {"parent": {"name": "..", "sha256": "0" * 64}},
        {"parent": {"name": "", "sha256": "0" * 64}},
        {"parent": {"name": "../v1", "sha256": "0" * 64}},
        {"parent": {"name": "/etc", "sha256": "0" * 64}},
        {"parent": {"name": "a/b/c", "sha256": "0" * 64}},
        {"parent": {"name": "v1", "sha256": "0" * 63}},
        {"parent": {"name": "v1\0", "sha256": "0" * 64}},
    ],
    ids=str,
)
def test_a_parent_that_is_not_as_the_format_has_it(fields: dict[str, Any], copies: Path) -> None:
    forge(copies / "v2", **fields)
    with pytest.raises(DeltacomeError, match="is damaged: version 6 names a parent, 7 may, and no other does"):
        Artifact(copies / "v2")


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["weights"][name].update(fields)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["base"].update(fingerprint="0" * 64),
        lambda manifest: manifest["base_files"].update({"tokenizer.json": "0" * 64}),
        lambda manifest: manifest["weights"].update(x={"shape": [20, 20], "dtype": "F32"}),
        entry("model.norm.weight", base="nothing", dense=None),
        entry(QUERY, base=EMBEDDING),
        entry("model.norm.weight", shape=[61], dense=None),
        entry("model.norm.weight", shape=[59], dense=None),
    ],
)
def test_a_child_that_does_not_fit_its_parent(edit: Callable[[dict[str, Any]], None], copies: Path) -> None:
    manifest = json.loads((copies / "v2" / MANIFEST).read_bytes())
    edit(manifest)
    for fields in manifest["weights"].values():
        if fields.get("dense", 0) is None:
            del fields["dense"]
    forge(copies / "v2", **{key: manifest[key] for key in ("base", "base_files", "weights")})
    with pytest.raises(DeltacomeError, match=r"is a broken artifact|is not as the format has it"):
        Artifact(copies / "v2")


def test_what_cannot_be_a_parent_or_a_child(
    chain: Chain, base: Path, finetuned: Path, tmp_path: Path, save: Save
) -> None:
    _, v2, _ = chain.versions
    out = chain.folder / "out"

    def refused(message: str, out: Path = out, **options: Any) -> None:
        with pytest.raises(DeltacomeError, match=message):
            compress(options.pop("base", chain.base), v2, out, **{"parent": chain.deltas[0], **options})
        assert not out.exists() and not list(out.parent.glob(".*"))

    refused("method bitdelta cannot be added to those of a parent", method="bitdelta")
    refused("method lossless cannot be added to those of a parent", method="lossless")
    refused("a scale a group cannot be added to those of a parent", method="delta-come", scale="minmax")
    refused("norms are folded on the base's own", fold_norms=True)
    refused("fingerprint differs", base=finetuned)
    refused("there is no folder", parent=tmp_path / "nothing")
    refused("is no compressed delta", parent=v2)
    refused("a delta looks for its parent beside itself; write to .*chain.*/out", out=tmp_path / "out")
    for method in ("bitdelta", "lossless"):
        compress(chain.base, chain.versions[0], tmp_path / method, method=method)
        refused("has terms that no others can be added to", tmp_path / "out", parent=tmp_path / method)
    untied = make_model()
    fine_tune(untied)
    folded = tmp_path / "folded"
    compress(save(make_model()), save(untied), folded, fold_norms=True)
    with pytest.raises(DeltacomeError, match="has folded norms, on which no delta can be made"):
        compress(save(make_model()), save(untied), tmp_path / "out", parent=folded)
    small = make_model(tie_word_embeddings=True)
    small.resize_token_embeddings(250)
    with pytest.raises(DeltacomeError, match=r"embed_tokens\.weight has fewer rows in .*; compress without --parent"):
        compress(chain.base, save(small), out, parent=chain.deltas[0])


def test_files_beside_the_weights(save: Save, tmp_path: Path) -> None:
    """A tokenizer that the parent carries does not cost again, and what the base has is the base's."""
    model = make_model(tie_word_embeddings=True)
    base = save(model, "base")
    versions = []
    for seed in (1, 2):
        fine_tune(model, seed)
        versions.append(save(model, f"v{seed}"))
        (versions[-1] / "chat_template.jinja").write_text("{{ 'mine' }}")
    generation = json.loads((base / "generation_config.json").read_text())
    (versions[1] / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 7}))
    chain = Chain(base, versions, tmp_path)
    first, second = map(Artifact, chain.deltas)
    assert set(first.files) == {"delta.safetensors", "chat_template.jinja"}
    assert set(second.files) == {"delta.safetensors", "generation_config.json"}
    assert second.sidecars()["chat_template.jinja"] == first.folder / "chat_template.jinja"
    assert second.sidecars()["tokenizer.json"] is None
    merge(base, chain.deltas[1], tmp_path / "merged")
    for name in second.sidecars():
        if name != "config.json":
            assert (tmp_path / "merged" / name).read_bytes() == (versions[1] / name).read_bytes()
    model = load(base, {"v2": chain.deltas[1]})
    assert model.deltas["v2"].ends == {7}
    flatten(base, chain.deltas[1], tmp_path / "flat", ratio=4)
    assert Artifact(tmp_path / "flat").files.keys() == {*first.files, *second.files}
    (chain.deltas[0] / "chat_template.jinja").write_text("{{ 'yours' }}")
    fail("v1 is a broken artifact: chat_template.jinja", "verify", chain.deltas[1])


def test_a_configuration_that_the_parent_has_changed(save: Save, tmp_path: Path) -> None:
    model = make_model()
    base, versions = save(model, "base"), []
    model.config.rope_theta = model.config.rope_parameters["rope_theta"] = 5000.0
    for seed in (1, 2):
        fine_tune(model, seed)
        versions.append(save(model, f"v{seed}"))
    chain = Chain(base, versions, tmp_path)
    assert "config.json" not in Artifact(chain.deltas[1]).files
    with pytest.raises(DeltacomeError, match="rope"):
        load(base, {"v2": chain.deltas[1]})
    assert merged(base, chain.deltas[1], tmp_path / "merged").config.rope_parameters["rope_theta"] == 5000.0


def test_modules_that_the_base_lacks(base: Path, finetuned: Path, tmp_path: Path) -> None:
    """They are the parent's where they have not changed, and stored whole again where they have."""
    torch.manual_seed(0)
    versions = []
    kept, changed = torch.randn(20, 30), torch.randn(20, 30)
    for number in (1, 2):
        versions.append(tmp_path / f"version{number}")
        shutil.copytree(finetuned, versions[-1])
        path = versions[-1] / "model.safetensors"
        tensors = load_file(path)
        tensors[QUERY] = tensors[QUERY] + 0.01 * number
        tower = {"tower.kept.weight": kept, "tower.changed.weight": changed * number}
        save_file({**tensors, **tower}, path, {"format": "pt"})
    chain = Chain(base, versions, tmp_path)
    artifact, checkpoint = open_checked(Checkpoint(base), chain.deltas[1]), Checkpoint(base)
    assert artifact.entries["tower.kept.weight"].tensors() == {}
    assert artifact.entries["tower.changed.weight"].dense == 0
    for name, expected in (("kept", kept), ("changed", 2 * changed)):
        weight = f"tower.{name}.weight"
        assert torch.equal(rebuild(artifact.weights[weight], artifact.terms(weight), checkpoint), expected)


def test_flattened(chain: Chain, tmp_path: Path) -> None:
    report = json.loads(
        succeed("flatten", chain.base, chain.deltas[2], "-o", tmp_path / "flat", "--ratio", 4, "--json")
    )
    artifact = Artifact(tmp_path / "flat")
    assert artifact.parent is None and artifact.manifest["format_version"] == FORMAT_VERSION
    assert artifact.manifest["finetuned"] == Artifact(chain.deltas[2]).manifest["finetuned"]
    assert report["artifact_ratio"] > 3.9 and report["artifact_bytes"] < Artifact(chain.deltas[2]).chain_bytes
    found = difference(tmp_path / "flat", chain.base, chain.versions[2])
    assert found < 0.5 * difference(chain.deltas[0], chain.base, chain.versions[2])
    Reader(tmp_path / "flat", chain.base)
    fail("has no parent: there is nothing to flatten", "flatten", chain.base, chain.deltas[0], "-o", tmp_path / "no")
    fail("is a delta; merge it", "compress", chain.base, chain.deltas[1], "-o", tmp_path / "no", "--calibration", "x")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_killed_run_goes_on(
    calibrated: bool, chain: Chain, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(chain.deltas[0], tmp_path / "v1")
    options: dict[str, Any] = {"parent": tmp_path / "v1", "ratio": 4}
    if calibrated:
        options |= {"method": "delta-come", "calibration": examples}
    compress(chain.base, chain.versions[1], tmp_path / "whole", **options)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for is_other in (False, True):
        warnings: list[str] = []
        out = tmp_path / f"out-{is_other}"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("deltacome.compression.pipeline.write_artifact", interrupt)
            compress(chain.base, chain.versions[1], out, **options)
        if is_other:
            options["parent"] = None
        compress(chain.base, chain.versions[1], out, **options, warn=warnings.append)
        assert any("going on" in warning for warning in warnings) != is_other
        assert (files(out) == files(tmp_path / "whole")) != is_other


def test_a_server_has_a_child_when_its_parent_is_there(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(chain.base)
    registry = Registry(model, model.tenants.checkpoint, "base", Metrics(), folder=tmp_path)

    def names() -> set[str]:
        asyncio.run(registry.rescan())
        return set(registry.deltas)

    shutil.copytree(chain.deltas[1], tmp_path / "v2")
    assert names() == names() == set()
    assert [record.message for record in caplog.records] == ["delta refused"]  # once
    weights = chain.deltas[0] / "delta.safetensors"
    shutil.copytree(chain.deltas[0], tmp_path / "v1")
    for path in (weights, chain.deltas[0] / MANIFEST):  # half of it
        (tmp_path / "v1" / path.name).write_bytes(path.read_bytes()[:-9])
        assert names() == names() == set()
        shutil.copyfile(path, tmp_path / "v1" / path.name)
    assert names() == {"v1", "v2"}
    known = registry.deltas["v2"]
    assert known.size == Artifact(chain.deltas[1]).chain_bytes
    loaded = asyncio.run(registry.lease("v2"))
    assert loaded.tenant is not None and loaded.bytes > asyncio.run(registry.lease("v1")).bytes
    assert names() == {"v1", "v2"} and registry.deltas["v2"] is known
    shutil.rmtree(tmp_path / "v1")
    shutil.copytree(chain.deltas[0], tmp_path / "v1")
    assert names() == {"v1", "v2"} and registry.deltas["v2"] is not known  # its parent is other files by now


def test_in_python() -> None:
    assert deltacome.flatten is flatten
    assert find_lineage(Path("x"), {}) == [] and MOST_PARENTS > 10
