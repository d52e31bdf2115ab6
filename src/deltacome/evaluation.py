"""The comparison of base, fine-tuned model and compressed deltas, as one table."""

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoint import Checkpoint
from deltacome.data import Encoder, Example, read_examples
from deltacome.errors import DeltacomeError
from deltacome.merging import load_merged, open_checked
from deltacome.metrics import ANSWER_PATTERN, Mean, answer, divergence, is_right
from deltacome.progress import bar

LONGEST = 2048  # tokens of an example that are used
BASE, FINETUNED = "base", "fine-tuned"


def evaluate(
    base: str | Path,
    finetuned: str | Path,
    deltas: dict[str, str | Path],
    data: str | Path,
    *,
    offtask: str | Path | None = None,
    limit: int | None = None,
    new_tokens: int = 64,
    chat_template: str | None = None,
    answer_pattern: str = ANSWER_PATTERN,
) -> list[dict[str, Any]]:
    """Compare the base, the fine-tuned model and compressed deltas, all in float32.

    Args:
        deltas: artifact folders by name.
        data: JSONL file of the fine-tune's own task, held out; on-task figures are over its completions.
        offtask: JSONL file with `text`; off-task KL is over all its positions.
        limit: how many of the first lines of `data` are used.
        new_tokens: the longest answer.
        chat_template: Jinja file, or `none`, in place of the tokenizers' own.
        answer_pattern: regular expression whose group is the answer; the last match counts.

    Returns:
        A row per model with its figures, each a value with its standard error under the same key + `_error`, and its
        `outputs`. What a file gives no ground for is absent.

    Raises:
        DeltacomeError: on bad input.
    """
    examples = read_examples(data, limit)
    texts = read_examples(offtask) if offtask is not None else []
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise DeltacomeError(f"{answer_pattern!r} is no regular expression: {error}") from error
    base_checkpoint = Checkpoint(base)
    artifacts = {name: open_checked(base_checkpoint, path) for name, path in deltas.items()}
    reference, tokenizer = load(Checkpoint(finetuned))
    sources: dict[str, Callable[[], tuple[Any, Any]]] = {
        BASE: partial(load, base_checkpoint),
        FINETUNED: lambda: (reference, tokenizer),
        **{name: partial(load_merged, base_checkpoint, artifact) for name, artifact in artifacts.items()},
    }
    comparison = _Comparison(reference, Encoder(tokenizer, chat_template), examples, texts)
    rows = []
    for name, source in sources.items():
        started = time.monotonic()
        row: dict[str, Any] = {"name": name}
        if name in artifacts:
            artifact = artifacts[name]
            row |= {"method": artifact.method["name"], "artifact_ratio": round(artifact.ratio, 3)}
            row |= {"linear_ratio": artifact.manifest["linear_ratio"], "bytes": artifact.bytes}
        model, own_tokenizer = source()
        row |= comparison.measure(name, model, Encoder(own_tokenizer, chat_template), new_tokens, pattern)
        row["seconds"] = round(time.monotonic() - started, 1)
        rows.append(row)
    _add_retention(rows)
    return rows


class _Comparison:
    """The fine-tuned model as the reference, and the encoded data."""

    def __init__(self, reference: Any, encoder: Encoder, examples: list[Example], texts: list[Example]) -> None:
        self.reference = reference
        self.tasks = [example for example in examples if example.messages]
        self.on_task, self.off_task = ([cut(encoder.example(e)) for e in some] for some in (examples, texts))

    def measure(
        self, name: str, model: Any, encoder: Encoder, new_tokens: int, pattern: re.Pattern[str]
    ) -> dict[str, Any]:
        """One model's figures with their standard errors, and its answers, prompted through its own encoder."""
        add_tokens(model, self.reference.get_input_embeddings().num_embeddings)
        row: dict[str, Any] = {}
        figures: dict[str, Mean] = {}
        total = len(self.on_task) + len(self.off_task) + len(self.tasks)
        with bar(f"evaluating {name}", total) as advance:
            figures["on_task_kl"], figures["nll"] = divergence(self.reference, model, self.on_task, advance)
            if self.off_task:
                figures["off_task_kl"], _ = divergence(self.reference, model, self.off_task, advance)
            if self.tasks:
                prompts = [encoder.prompt(example.messages) for example in self.tasks]
                row["outputs"] = answer(model, encoder.tokenizer, prompts, new_tokens, advance)
                right = sum(is_right(o, e, pattern) for o, e in zip(row["outputs"], self.tasks, strict=True))
                figures["accuracy"] = Mean.of_successes(right, len(self.tasks))
        for key, mean in figures.items():
            row |= {key: mean.value, f"{key}_error": mean.error}
        return row


def load(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """A checkpoint's model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"transformers cannot load {checkpoint.source}: {reason}") from error


def add_tokens(model: Any, size: int) -> None:
    """Give a model whose vocabulary is smaller than `size` the missing tokens, with embeddings of zero."""
    old = model.get_input_embeddings().num_embeddings
    if old < size:
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.data[old:] = 0


def cut(example: tuple[list[int], int]) -> tuple[list[int], int]:
    """An encoded example without what is over the longest length."""
    ids, start = example
    return ids[:LONGEST], min(start, LONGEST - 1)


def _add_retention(rows: list[dict[str, Any]]) -> None:
    """(score - base's) / (fine-tuned's - base's), where the fine-tune changes the score at all."""
    scores = {row["name"]: row.get("accuracy") for row in rows}
    low, high = scores[BASE], scores[FINETUNED]
    if low is not None and high is not None and high != low:
        for row in rows:
            row["retention"] = (row["accuracy"] - low) / (high - low)


COLUMNS = {
    "name": "model",
    "method": "method",
    "artifact_ratio": "artifact ratio",
    "linear_ratio": "linear ratio",
    "on_task_kl": "on-task KL",
    "nll": "NLL",
    "off_task_kl": "off-task KL",
    "accuracy": "accuracy",
    "retention": "retention",
    "seconds": "seconds",
}


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, in the order of `COLUMNS`."""

    def text(key: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        if key.endswith("ratio"):
            return f"1/{value:.1f}"
        if key.endswith("kl"):
            return f"{value:.5f} ± {row[f'{key}_error']:.5f}"
        if key in ("nll", "accuracy"):
            return f"{value:.3f} ± {row[f'{key}_error']:.3f}"
        return f"{value:.3f}" if key == "retention" else str(value)

    return [text(key) for key in COLUMNS]


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as JSON to `path` and as a Markdown table beside it."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *map(cells, rows)]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
