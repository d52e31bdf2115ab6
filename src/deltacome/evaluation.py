"""How far models are from the fine-tuned one: KL, NLL and accuracy of greedy answers."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoint import Checkpoint
from deltacome.data import Encoder, Example, read_examples
from deltacome.errors import DeltacomeError
from deltacome.merging import load_merged, open_checked
from deltacome.progress import bar

TOKENS_AT_ONCE = 1024  # logits of so many tokens are in memory, twice
ANSWERS_AT_ONCE = 32
LONGEST = 2048
ANSWER_PATTERN = r"####\s*(\S+)"
BASE, FINETUNED = "base", "fine-tuned"


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of_tokens(cls, sums: Tensor, counts: Tensor) -> "Mean":
        """Mean over all tokens, from each example's sum and number of tokens; examples are what is independent."""
        total, examples = max(float(counts.sum()), 1.0), len(counts)
        value = float(sums.sum()) / total
        spread = float((sums - value * counts).square().sum())
        return cls(value, (spread * examples / max(examples - 1, 1)) ** 0.5 / total)

    @classmethod
    def of_successes(cls, successes: int, trials: int) -> "Mean":
        """A proportion."""
        value = successes / trials
        return cls(value, (value * (1 - value) / trials) ** 0.5)


@torch.inference_mode()
def divergence(
    reference: Any, model: Any, encoded: Sequence[tuple[list[int], int]], advance: Callable[[float], None]
) -> tuple[Mean, Mean]:
    """KL(reference || model) and the model's NLL, in nats a token, over the tokens from each example's start on.

    Args:
        reference, model: causal language models of transformers.
        encoded: token ids, and the first position that counts, per example.
        advance: called with the number of examples done.
    """
    lengths = [len(ids) for ids, _ in encoded]
    order = sorted(range(len(encoded)), key=lengths.__getitem__)
    kl, nll, counts = torch.zeros(len(encoded)), torch.zeros(len(encoded)), torch.zeros(len(encoded))
    start = 0
    while start < len(order):
        chunk = [order[start]]
        while (
            start + len(chunk) < len(order) and lengths[order[start + len(chunk)]] * (len(chunk) + 1) <= TOKENS_AT_ONCE
        ):
            chunk.append(order[start + len(chunk)])
        start += len(chunk)
        ids, mask = pad([encoded[i][0] for i in chunk], left=False)
        expected = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = expected
        if model is not reference:
            found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        vocabulary = min(expected.shape[-1], found.shape[-1])  # one of them may be padded
        for row, i in enumerate(chunk):
            first, last = encoded[i][1], lengths[i]
            p, q = (x[row, first - 1 : last - 1, :vocabulary].float().log_softmax(-1) for x in (expected, found))
            kl[i] = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            nll[i] = -q.gather(1, ids[row, first:last, None]).sum()
            counts[i] = last - first
        advance(len(chunk))
    return Mean.of_tokens(kl, counts), Mean.of_tokens(nll, counts)


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    new_tokens: int,
    advance: Callable[[float], None] = lambda _: None,
) -> list[str]:
    """Greedy answers to prompts of token ids, up to the end token or `new_tokens` tokens."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        chunk = order[start : start + ANSWERS_AT_ONCE]
        ids, mask = pad([prompts[i] for i in chunk], left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id or 0,
        )
        for i, row in zip(chunk, output[:, ids.shape[1] :], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
        advance(len(chunk))
    return answers


def is_right(output: str, example: Example, pattern: str = ANSWER_PATTERN) -> bool:
    """Whether an answer is the example's: its `answer` as the last match of `pattern`, else the whole completion."""
    if example.answer is None:
        return output.strip() == example.completion.strip()
    found = re.findall(pattern, output)
    if not found:
        return False
    given, wanted = found[-1].strip(), example.answer.strip()
    try:
        return float(given.replace(",", "")) == float(wanted.replace(",", ""))
    except ValueError:
        return bool(given == wanted)


def pad(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor (rows, longest), and its attention mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    examples = read_examples(data, limit)
    tasks = [example for example in examples if example.messages]
    texts = read_examples(offtask) if offtask is not None else []
    base_checkpoint = Checkpoint(base)
    artifacts = {name: open_checked(base_checkpoint, path) for name, path in deltas.items()}
    try:
        re.compile(answer_pattern)
    except re.error as error:
        raise DeltacomeError(f"{answer_pattern!r} is no regular expression: {error}") from error

    def load(source: str | Path) -> tuple[Any, Any]:
        folder = Checkpoint(source).folder
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            return model, AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise DeltacomeError(f"transformers cannot load {source}: {str(error).splitlines()[0]}") from error

    reference, tokenizer = load(finetuned)
    encoder = Encoder(tokenizer, chat_template)
    on_task, off_task = ([cut(encoder.example(example)) for example in some] for some in (examples, texts))
    sources: dict[str, Callable[[], tuple[Any, Any]]] = {
        BASE: lambda: load(base),
        FINETUNED: lambda: (reference, tokenizer),
    }
    sources |= {name: partial(load_merged, base_checkpoint, artifact) for name, artifact in artifacts.items()}
    rows = []
    for name, source in sources.items():
        started = time.monotonic()
        model, own_tokenizer = source()
        add_tokens(model, reference.get_input_embeddings().num_embeddings)
        row: dict[str, Any] = {"name": name}
        if name in artifacts:
            artifact = artifacts[name]
            row |= {"method": artifact.method["name"], "artifact_ratio": round(artifact.ratio, 3)}
            row |= {"linear_ratio": artifact.manifest["linear_ratio"], "bytes": artifact.bytes}
        with bar(f"evaluating {name}", len(on_task) + len(off_task) + len(tasks)) as advance:
            on_kl, nll = divergence(reference, model, on_task, advance)
            figures = {"on_task_kl": on_kl, "nll": nll}
            if off_task:
                figures["off_task_kl"], _ = divergence(reference, model, off_task, advance)
            if tasks:
                prompts = [Encoder(own_tokenizer, chat_template).prompt(example.messages) for example in tasks]
                row["outputs"] = answer(model, own_tokenizer, prompts, new_tokens, advance)
                right = sum(is_right(o, e, answer_pattern) for o, e in zip(row["outputs"], tasks, strict=True))
                figures["accuracy"] = Mean.of_successes(right, len(tasks))
        for key, mean in figures.items():
            row |= {key: mean.value, f"{key}_error": mean.error}
        row["seconds"] = round(time.monotonic() - started, 1)
        rows.append(row)
    _add_retention(rows)
    return rows


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
