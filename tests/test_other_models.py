"""The default method on trained fine-tunes of random models of other families: biases, layer norms, fused weights."""

import json
from pathlib import Path

import pytest
import torch

from conftest import Save, make_other, make_tokenizer
from deltacome import compress
from deltacome.evaluate.comparison import evaluate

SIZES = {"hidden_size": 192, "intermediate_size": 400, "num_hidden_layers": 4}


def sums(count: int, seed: int) -> list[dict[str, str]]:
    numbers = torch.randint(10, 100, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a, b in numbers]


def train(model: torch.nn.Module, examples: list[dict[str, str]]) -> None:
    """AdamW over whole examples; every parameter learns."""
    tokenizer = make_tokenizer()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": e["prompt"]}, {"role": "assistant", "content": e["completion"]}],
            return_dict=False,
        )
        for e in examples
    ]
    ids = torch.tensor([text[:27] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step in range(120):
        batch = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))[:16]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_less_kl_than_delta_come(family: str, save: Save, tmp_path: Path) -> None:
    model = make_other(family, **SIZES)
    base = save(model, "base")
    train(model, sums(400, 0))
    finetuned = save(model, "finetuned")
    data, text = tmp_path / "data.jsonl", tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in sums(30, 1)))
    text.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in (str.__doc__, int.__doc__, dict.__doc__)))
    for method in ("rate-distortion", "delta-come"):
        compress(base, finetuned, tmp_path / method, ratio=16, method=method)
    deltas = {name: tmp_path / name for name in ("rate-distortion", "delta-come")}
    rows = {row["name"]: row for row in evaluate(base, finetuned, deltas, data, offtask=text, new_tokens=1)}
    ours, theirs = rows["rate-distortion"], rows["delta-come"]
    assert ours["on_task_kl"] < 0.75 * theirs["on_task_kl"]
    assert ours["off_task_kl"] < 0.75 * theirs["off_task_kl"]
