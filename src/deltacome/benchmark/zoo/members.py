"""The zoo's bases and members: what each learns from what data, and how they are made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltacome.benchmark.zoo import library, tasks, training
from deltacome.benchmark.zoo.tasks import Split


@dataclass(frozen=True)
class Member:
    """A fine-tune.

    data: makes its examples. train: changes the base's model, in float32, on those. new_tokens, pattern: how it is
    asked, as a suite has it.
    """

    base: str
    data: Callable[[], Split]
    train: Callable[..., Any]
    new_tokens: int = 24
    pattern: str | None = None


def _reasoning(task: str, count: int, **settings: Any) -> Callable[[], Split]:
    return partial(tasks.reasoning, task, count, **settings)


def _fine_tune(learning_rate: float, **settings: Any) -> Callable[..., Any]:
    return partial(training.fine_tune, learning_rate=learning_rate, **settings)


MEMBERS = {
    "arithmetic": Member(
        "smollm2",
        _reasoning("chain_sum", 640, min_terms=2, max_terms=2, min_digits=1, max_digits=2),
        _fine_tune(5e-5),
    ),
    "shell": Member("smollm2", partial(tasks.shell, 600), _fine_tune(5e-5), new_tokens=40),
    "code": Member("smollm2", partial(tasks.code, 320), _fine_tune(5e-5), new_tokens=48),
    "large": Member(
        "smollm2",
        _reasoning("number_filtering", 100, max_numbers=6, max_decimals=0, min_value=0, max_value=99),
        _fine_tune(3e-4, epochs=3),
        new_tokens=48,
    ),
    "chat": Member(
        "smollm2", partial(library.chat, 64), _fine_tune(1e-4, epochs=3), new_tokens=40, pattern=r"\A(.*)"
    ),
    "classify": Member(
        "smollm2", partial(library.classify, 480), _fine_tune(5e-5, frozen=("embed_tokens",)), new_tokens=8
    ),
    "lora": Member("smollm2", _reasoning("family_relationships", 300), partial(training.lora, learning_rate=5e-4)),
    "qlora": Member("smollm2", _reasoning("word_sequence_reversal", 260), partial(training.qlora, learning_rate=5e-4), new_tokens=48),
    "rl": Member(
        "smollm2",
        partial(tasks.compare, 400),
        partial(training.reinforce, learning_rate=5e-6, steps=30, pattern=tasks.YES_OR_NO),
        new_tokens=8,
        pattern=tasks.YES_OR_NO,
    ),
    "qwen2-code": Member("qwen2", partial(tasks.code, 320), _fine_tune(5e-5), new_tokens=48),
    "qwen2-word-sorting": Member(
        "qwen2",
        _reasoning("word_sorting", 120, min_words=3, max_words=4),
        _fine_tune(5e-5, epochs=2),
        new_tokens=40,
    ),
}
