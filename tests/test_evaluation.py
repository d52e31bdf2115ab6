import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Save, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoded, Example
from deltacome.evaluate.comparison import evaluate, save_table
from deltacome.evaluate.metrics import Mean, answer, divergence, is_right, retention
from deltacome.restore.merging import load_merged, open_checked


@pytest.fixture(scope="module")
def delta(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deltas") / "delta"
    compress(base, finetuned, out, ratio=4)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_on_disk_and_in_memory_give_the_same_logits(
    dtype: torch.dtype, base: Path, delta: Path, tmp_path: Path
) -> None:
    merge(base, delta, tmp_path / "merged", dtype)
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    checkpoint = Checkpoint(base)
    in_memory, tokenizer = load_merged(checkpoint, open_checked(checkpoint, delta), dtype)
    ids = tokenizer("Two ways to the same weights", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(on_disk(ids).logits, in_memory(ids).logits)
    assert on_disk.config.to_dict() | {"_name_or_path": ""} == in_memory.config.to_dict() | {"_name_or_path": ""}


def test_merging_keeps_the_checkpoints_dtype_and_files(
    base: Path, finetuned: Path, delta: Path, tmp_path: Path
) -> None:
    merge(base, delta, tmp_path / "merged")
    ours, theirs = Checkpoint(tmp_path / "merged"), Checkpoint(finetuned)
    assert {n: (i.shape, i.dtype) for n, i in ours.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in theirs.tensors.items()
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_merging_in_shards(base: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(base, delta, tmp_path / "one")
    monkeypatch.setattr("deltacome.restore.merging.SHARD_BYTES", 40_000)
    merge(base, delta, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_a_sharded_artifact(base: Path, finetuned: Path, delta: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("deltacome.compression.writing.SHARD_BYTES", 10_000)
    compress(base, finetuned, tmp_path / "delta", ratio=4)
    artifact, whole = Artifact(tmp_path / "delta"), Artifact(delta)
    assert len(artifact.weight_files) > 2 and artifact.entries == whole.entries
    merge(base, tmp_path / "delta", tmp_path / "a")
    merge(base, delta, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_merging_refuses_another_base_and_leaves_nothing(save: Save, base: Path, delta: Path, tmp_path: Path) -> None:
    other = save(make_model(5, tie_word_embeddings=True))
    with pytest.raises(DeltacomeError, match="fingerprint differs"):
        merge(other, delta, tmp_path / "merged")
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    with pytest.raises(DeltacomeError, match=r"tokenizer\.json in .* is not the one"):
        merge(copy, delta, tmp_path / "merged")
    broken = tmp_path / "delta"
    shutil.copytree(delta, broken)
    content = bytearray((broken / "delta.safetensors").read_bytes())
    content[-50] ^= 1
    (broken / "delta.safetensors").write_bytes(content)
    with pytest.raises(DeltacomeError, match="SHA-256 differs"):
        merge(base, broken, tmp_path / "merged")
    (tmp_path / "taken").mkdir()
    with pytest.raises(DeltacomeError, match="exists already"):
        merge(base, delta, tmp_path / "taken")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta", "taken"}


def test_divergence_is_its_definition(save: Save) -> None:
    """Against float64 probabilities of unpadded single examples."""
    model = make_model().eval()
    reference = make_model(tie_word_embeddings=False).eval()
    fine_tune(reference)
    torch.manual_seed(0)
    encoded = [
        Encoded(torch.randint(0, 259, (length,)).tolist(), start)
        for length, start in ((5, 1), (30, 20), (3, 2), (2, 1))
    ]
    kl_sum = nll_sum = 0.0
    count = 0
    with torch.inference_mode():
        for example in encoded:
            ids, start = example.ids, example.start
            p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (reference, model))
            for position in range(start - 1, len(ids) - 1):
                kl_sum += float((p[position] * (p[position] / q[position]).log()).sum())
                nll_sum -= float(q[position, ids[position + 1]].log())
                count += 1
    kl, nll = divergence(reference, model, encoded, lambda _: None)
    assert kl.value == pytest.approx(kl_sum / count, rel=1e-4) and nll.value == pytest.approx(nll_sum / count, rel=1e-5)
    assert divergence(model, model, encoded, lambda _: None)[0].value == pytest.approx(0, abs=1e-7)


def test_standard_errors() -> None:
    torch.manual_seed(0)
    counts = torch.randint(1, 20, (2000,)).float()
    sums = counts * (3 + torch.randn(2000))
    mean = Mean.of_ratio(sums, counts)
    parts = [Mean.of_ratio(sums[i::200], counts[i::200]).value for i in range(200)]
    assert mean.error == pytest.approx(float(torch.tensor(parts).std()) / 200**0.5, rel=0.15)
    assert Mean.of_successes(25, 100) == Mean(0.25, pytest.approx(0.0433, rel=1e-2))


@pytest.mark.parametrize(
    ("output", "wanted", "right"),
    [
        ("2 + 3 = 5\n#### 5", "5", True),
        ("#### 4\n#### 5.0", "5", True),
        ("#### 1,000", "1000", True),
        ("#### 5", "6", False),
        ("5", "5", False),
        ("#### yes", "yes", True),
        ("#### no", "yes", False),
    ],
)
def test_answers(output: str, wanted: str, right: bool) -> None:
    assert is_right(output, Example((), "", wanted)) is right


def test_whole_completions() -> None:
    assert is_right(" card_lost\n", Example((), "card_lost")) and not is_right("card", Example((), "card_lost"))


def test_answers_do_not_depend_on_the_batch(save: Save) -> None:
    model = make_model().eval()
    tokenizer = AutoTokenizer.from_pretrained(save(make_model()))
    prompts = [Encoded(tokenizer("x" * length).input_ids) for length in (3, 17, 8)]
    alone = [answer(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert answer(model, tokenizer, prompts, 8) == alone


def test_the_table(base: Path, finetuned: Path, delta: Path, examples: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Off the task."}\n{"text": "More of it."}\n')
    rows = evaluate(base, finetuned, {"d": delta}, examples, offtask=text, new_tokens=4)
    assert [row["name"] for row in rows] == ["base", "fine-tuned", "d"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["fine-tuned"]["on_task_kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < by_name["d"]["on_task_kl"] < by_name["base"]["on_task_kl"]
    assert 0 < by_name["d"]["off_task_kl"] < by_name["base"]["off_task_kl"]
    assert by_name["d"]["artifact_ratio"] == pytest.approx(Artifact(delta).ratio, abs=1e-3)
    assert all(len(row["outputs"]) == 11 and row["accuracy"] == 0 for row in rows)
    assert "retention" not in by_name["d"]  # the fine-tune of noise does not change the score
    save_table(rows, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert (tmp_path / "table.md").read_text().count("\n") == 5


def test_a_grown_vocabulary_is_evaluated(save: Save, examples: Path, tmp_path: Path) -> None:
    model = make_model()
    base = save(model)
    model.resize_token_embeddings(270, mean_resizing=False)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    rows = evaluate(base, finetuned, {"d": tmp_path / "delta"}, examples, new_tokens=2)
    assert rows[2]["on_task_kl"] < rows[0]["on_task_kl"]


def test_retention_and_its_paired_error() -> None:
    base, finetuned = torch.zeros(400), torch.zeros(400)
    base[:40], finetuned[:200] = 1, 1
    delta = finetuned.clone()
    delta[160:220] = 1 - delta[160:220]  # 40 lost, 20 new
    assert retention(base, base, finetuned) == Mean(0, 0) and retention(finetuned, base, finetuned) == Mean(1, 0)
    assert retention(delta, base, base) is None
    kept = retention(delta, base, finetuned)
    assert kept is not None and kept.value == pytest.approx((180 - 40) / (200 - 40))
    assert retention(1 - delta, 1 - base, 1 - finetuned) == kept  # a fine-tune that lowers the score
    torch.manual_seed(0)
    values = []
    for _ in range(500):
        sample = torch.randint(0, 400, (400,))
        resampled = retention(delta[sample], base[sample], finetuned[sample])
        assert resampled is not None
        values.append(resampled.value)
    assert kept.error == pytest.approx(float(torch.tensor(values).std()), rel=0.1)
