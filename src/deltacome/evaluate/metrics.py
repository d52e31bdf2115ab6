"""How far a model is from another, and how well it answers: KL, NLL, accuracy of greedy answers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.data import Encoded, Example, collate
from deltacome.errors import DeltacomeError
from deltacome.language import as_set, up_to_end

TOKENS_AT_ONCE = 1024  # logits of so many tokens are in memory, twice
ANSWERS_AT_ONCE = 32
ANSWER_PATTERN = r"####\s*(\S+)"


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of_ratio(cls, sums: Tensor, counts: Tensor) -> "Mean":
        """All sums over all counts, a mean over tokens for instance; the examples, (n,), are what is independent."""
        total, examples = max(float(counts.sum()), 1.0), len(counts)
        value = float(sums.sum()) / total
        spread = float((sums - value * counts).square().sum())
        return cls(value, (spread * examples / max(examples - 1, 1)) ** 0.5 / total)

    @classmethod
    def of_successes(cls, successes: int, trials: int) -> "Mean":
        """A proportion."""
        value = successes / trials
        return cls(value, (value * (1 - value) / trials) ** 0.5)


def divergence(
    reference: Any, model: Any, encoded: Sequence[Encoded], advance: Callable[[float], None]
) -> tuple[Mean, Mean]:
    """KL(reference || model) and the model's NLL, see `divergences`."""
    return divergences(reference, [model], encoded, advance)[0]


@torch.inference_mode()
def divergences(
    reference: Any, models: Sequence[Any], encoded: Sequence[Encoded], advance: Callable[[float], None]
) -> list[tuple[Mean, Mean]]:
    """KL(reference || model) and the model's NLL, in nats a token, over the tokens from each example's start on.

    Args:
        reference, models: causal language models of transformers; the reference computes once for all models.
        encoded: the examples.
        advance: called with the number of examples done.

    Returns:
        KL and NLL of every model.
    """
    lengths = [len(example.ids) for example in encoded]
    order = sorted(range(len(encoded)), key=lengths.__getitem__)
    kl, nll = torch.zeros(2, len(models), len(encoded))
    counts = torch.tensor([float(len(example.ids) - example.start) for example in encoded])
    start = 0
    while start < len(order):
        chunk = [order[start]]
        while (
            start + len(chunk) < len(order) and lengths[order[start + len(chunk)]] * (len(chunk) + 1) <= TOKENS_AT_ONCE
        ):
            chunk.append(order[start + len(chunk)])
        start += len(chunk)
        inputs = collate([encoded[i] for i in chunk], left=False)
        expected = reference(**inputs, use_cache=False).logits
        for number, model in enumerate(models):
            found = expected
            if model is not reference:
                found = model(**inputs, use_cache=False).logits
            vocabulary = min(expected.shape[-1], found.shape[-1])  # one of them may be padded
            for row, i in enumerate(chunk):
                first, last = encoded[i].start, lengths[i]
                p, q = (x[row, first - 1 : last - 1, :vocabulary].float().log_softmax(-1) for x in (expected, found))
                kl[number, i] = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
                nll[number, i] = -q.gather(1, inputs["input_ids"][row, first:last, None]).sum()
            advance(len(chunk) / len(models))
    return [(Mean.of_ratio(kl[i], counts), Mean.of_ratio(nll[i], counts)) for i in range(len(models))]


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    new_tokens: int,
    advance: Callable[[float], None] = lambda _: None,
) -> list[str]:
    """Greedy answers to prompts, up to an end token or `new_tokens` tokens.

    End tokens are those of the model's generation configuration and the tokenizer's.
    """
    answers = [""] * len(prompts)
    ends = as_set(model.generation_config.eos_token_id) | as_set(tokenizer.eos_token_id)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        chunk = order[start : start + ANSWERS_AT_ONCE]
        inputs = collate([prompts[i] for i in chunk], left=True)
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        for i, row in zip(chunk, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = tokenizer.decode(up_to_end(row, ends), skip_special_tokens=True)
        advance(len(chunk))
    return answers


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression that finds an answer, by its only group or as a whole.

    Raises:
        DeltacomeError: if it is none, or has several groups.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DeltacomeError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.groups > 1:
        raise DeltacomeError(
            f"{pattern!r} has {compiled.groups} groups, and one is the answer; write (?:...) for the others"
        )
    return compiled


def is_right(output: str, example: Example, pattern: str | re.Pattern[str] = ANSWER_PATTERN) -> bool:
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


def retention(right: Tensor, base: Tensor, finetuned: Tensor) -> Mean | None:
    """(score - base's) / (fine-tuned's - base's), or None where the fine-tune leaves the score as it is.

    The error is that of paired examples: a problem that every model solves adds nothing to it.

    Args:
        right, base, finetuned: 1 for each example that a model gets right and 0 for the others, (n,).
    """
    gained = finetuned - base
    sign = gained.sum().sign()  # a fine-tune may lower the score
    return Mean.of_ratio(sign * (right - base), sign * gained) if sign else None
