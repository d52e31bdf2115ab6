"""`evaluate --by-part`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import fail, succeed
from conftest import Save, fine_tune, make_any, make_model
from deltacome import Artifact, compress
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, read_examples
from deltacome.evaluate.metrics import divergence
from deltacome.evaluate.parts import evaluate_parts, parts_of
from deltacome.restore.merging import load_merged, open_checked

KINDS = {
    "embeddings": ["embed_tokens"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def delta(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deltas") / "delta"
    compress(base, finetuned, out, ratio=8)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text('{"text": "Off the task."}\n{"text": "More of it."}\n')
    return path


def by_part(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["part"], row["module"]): row for row in rows}


def test_rows_are_kl_of_models_made_by_hand(
    base: Path, finetuned: Path, delta: Path, examples: Path, text: Path
) -> None:
    rows = evaluate_parts(base, finetuned, {"d": delta}, examples, offtask=text)
    found = by_part(rows)
    expected = [("all", ""), ("embeddings", "embed_tokens")]
    expected += [("attention", kind) for kind in ["", *KINDS["attention"]]]
    expected += [("MLP", kind) for kind in ["", *KINDS["MLP"]]]
    assert sorted(found) == sorted([*expected, ("exact", "")]) and len(rows) == len(found)
    assert found["exact", ""].keys() == {"name", "part", "module", "bytes"}
    reference = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32).eval()
    checkpoint = Checkpoint(base)
    merged = dict(load_merged(checkpoint, open_checked(checkpoint, delta))[0].named_parameters())
    encoder = Encoder(AutoTokenizer.from_pretrained(finetuned))
    for part, module in expected:
        kinds = [module] if module else KINDS.get(part, [kind for kinds in KINDS.values() for kind in kinds])
        model = copy.deepcopy(reference)
        for name, parameter in model.named_parameters():
            if any(f"{kind}.weight" in name for kind in kinds):
                parameter.data.copy_(merged[name])
        for figure, file in (("on_task_kl", examples), ("off_task_kl", text)):
            encoded = [encoder.example(example) for example in read_examples(file)]
            kl, _ = divergence(reference, model, encoded, lambda _: None)
            assert found[part, module][figure] == pytest.approx(kl.value, rel=1e-3), (part, module)
            assert found[part, module][f"{figure}_error"] == pytest.approx(kl.error, rel=1e-3)
            assert kl.value > 1e-6


def test_bytes_are_all_bytes(delta: Path) -> None:
    artifact = Artifact(delta)
    parts = parts_of(artifact, make_model(tie_word_embeddings=True))
    size = {(part.part, part.module): part.bytes for part in parts}
    assert size["all", ""] + size["exact", ""] == sum(entry.bytes for entry in artifact.entries.values())
    assert size["all", ""] == size["embeddings", "embed_tokens"] + size["attention", ""] + size["MLP", ""]
    for part in ("attention", "MLP"):
        assert size[part, ""] == sum(size[part, kind] for kind in KINDS[part])


def test_an_untied_head_and_several_deltas(save: Save, examples: Path, tmp_path: Path) -> None:
    """The coarser delta has the larger KL, and a weight that is kept exactly no row."""
    model = make_model()
    base = save(model)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "fine", ratio=4)
    compress(base, finetuned, tmp_path / "coarse", ratio=16)
    compress(base, finetuned, tmp_path / "exact", ratio=8, embeddings="exact")
    deltas = {name: tmp_path / name for name in ("fine", "coarse", "exact")}
    rows = evaluate_parts(base, finetuned, deltas, examples, limit=3)
    found = {name: by_part([row for row in rows if row["name"] == name]) for name in deltas}
    assert list(dict.fromkeys(row["name"] for row in rows)) == list(deltas)
    for part in [("head", "lm_head"), ("embeddings", "embed_tokens"), ("attention", ""), ("all", "")]:
        assert 0 < found["fine"][part]["on_task_kl"] < found["coarse"][part]["on_task_kl"]
        assert (part in found["exact"]) == (part[0] in ("attention", "all"))
    assert "off_task_kl" not in rows[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2", "gpt_neox", "phi3"])
def test_families(family: str, save: Save, examples: Path, tmp_path: Path) -> None:
    model = make_any(family)
    base = save(model)
    fine_tune(model, size=0.5)  # those of a smaller one drown in float32
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "delta", ratio=6)
    found = by_part(evaluate_parts(base, finetuned, {"d": tmp_path / "delta"}, examples, limit=3))
    parts = {part for part, _ in found}
    assert {"all", "embeddings", "attention", "exact"} <= parts and "other" not in parts
    assert ("experts" in parts) == (family in ("mixtral", "gpt_oss")) != ("MLP" in parts)
    assert all(row["on_task_kl"] > 0 for row in found.values() if row["part"] != "exact")
    if family == "mixtral":  # stacked by transformers
        assert ("experts", "gate_up_proj") in found and ("experts", "down_proj") in found


def test_what_is_no_substitute_is_refused(save: Save, base: Path, finetuned: Path, examples: Path, tmp_path: Path):
    compress(base, finetuned, tmp_path / "folded", ratio=4, fold_norms=True)
    compress(base, finetuned, tmp_path / "plain", ratio=4)
    command = ("--data", examples, "--by-part", "-o", tmp_path / "out.json")
    fail(
        "f was compressed with --fold-norms, so its weights are right only together; leave out --by-part",
        *("evaluate", base, "--finetuned", finetuned, "--delta", f"f={tmp_path / 'folded'}", *command),
    )
    other = save(make_model(intermediate_size=110))
    fail(
        "p is not a delta of this fine-tuned model",
        *("evaluate", base, "--finetuned", other, "--delta", f"p={tmp_path / 'plain'}", *command),
    )
    assert not (tmp_path / "out.json").exists()


def test_the_command(base: Path, finetuned: Path, delta: Path, examples: Path, tmp_path: Path) -> None:
    command = ("evaluate", base, "--finetuned", finetuned, "--delta", f"d={delta}", "--data", examples, "--by-part")
    output = tmp_path / "parts.json"
    rows = json.loads(succeed(*command, "--limit", 2, "--json", "-o", output))
    assert json.loads(output.read_text()) == rows
    lines = output.with_suffix(".md").read_text().splitlines()
    assert lines[0] == "| model | part | module | bytes | on-task KL | off-task KL |" and len(lines) == len(rows) + 2
    printed = succeed(*command, "--limit", 2, "-o", output)
    assert "attention" in printed and "gate_proj" in printed and "off-task" not in printed
    fail("--show goes with answers, and --by-part has none; leave it out", *command, "--show", 1)
    tasks = ("evaluate", base, "--finetuned", finetuned, "--delta", delta, "--tasks", "gsm8k", "--by-part")
    fail("--by-part goes with --data; leave it out", *tasks)
