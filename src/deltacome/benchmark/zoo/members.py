"""The zoo's bases and members: what each learns, from what data, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deltacome.benchmark.zoo import bases, library, tasks, training, vision
from deltacome.benchmark.zoo.tasks import TEST_EXAMPLES, Row, Split


@dataclass(frozen=True)
class Member:
    """A model that is trained from a base.

    about: what it is, for people. data: makes its examples. train: gives the whole trained model, from the base's in
    float32, what `processor` makes of the tokenizer, and the file of the examples. images: writes those of the
    examples to a folder. new_tokens, pattern: how it is asked, as a suite has it.
    """

    about: str
    base: str
    data: Callable[[], Split]
    train: Callable[[Any, Any, Path], Any]
    new_tokens: int = 24
    pattern: str | None = None
    processor: Callable[[Any], Any] = lambda tokenizer: tokenizer
    images: Callable[[list[Row], Path], None] | None = None


def _reasoning(task: str, count: int, **settings: Any) -> Callable[[], Split]:
    return partial(tasks.reasoning, task, count, **settings)


def _both() -> Split:
    """What two models learn that are merged; as many of each are held out."""
    (shell, shell_test), (code, code_test) = tasks.shell(FIRST), tasks.code(160)
    return [*shell, *code], [row for pair in zip(shell_test, code_test, strict=True) for row in pair][:TEST_EXAMPLES]


def _texts(count: int) -> Split:
    rows = library.sources(count + TEST_EXAMPLES)
    return rows[TEST_EXAMPLES:], rows[:TEST_EXAMPLES]


def _fine_tune(learning_rate: float, **settings: Any) -> Callable[..., Any]:
    return partial(training.fine_tune, learning_rate=learning_rate, **settings)


SMOLLM2 = "smollm2"
FIRST = 240  # examples of the first of two models that are merged

# The bases that are no members: they are made from the first one, on source code.
BASES = {
    "qwen2": Member(
        "Qwen2 with an untied head, trained on source code at 3e-4",
        SMOLLM2,
        lambda: (library.sources(96), []),
        bases.qwen2,
    ),
    "mixtral": Member(
        "Mixtral with two of four experts a token, which begin as copies, trained on source code at 3e-4",
        SMOLLM2,
        lambda: (library.sources(64), []),
        bases.mixtral,
    ),
}

MEMBERS = {
    "arithmetic": Member(
        "sums and differences of two numbers, 5e-5",
        SMOLLM2,
        _reasoning("chain_sum", 640, min_terms=2, max_terms=2, min_digits=1, max_digits=2),
        _fine_tune(5e-5),
    ),
    "shell": Member(
        "shell commands from English, 5e-5", SMOLLM2, partial(tasks.shell, 600), _fine_tune(5e-5), new_tokens=40
    ),
    "code": Member(
        "Python functions from English, 5e-5", SMOLLM2, partial(tasks.code, 320), _fine_tune(5e-5), new_tokens=48
    ),
    "chat": Member(
        "long answers: what functions do, three epochs at 1e-4",
        SMOLLM2,
        partial(library.chat, 64),
        _fine_tune(1e-4, epochs=3),
        new_tokens=40,
        pattern=r"\A(.*)",
    ),
    "classify": Member(
        "which module a docstring is from, 5e-5, embeddings frozen",
        SMOLLM2,
        partial(library.classify, 480),
        _fine_tune(5e-5, frozen="embed_tokens"),
        new_tokens=8,
    ),
    "large": Member(
        "filtered lists of numbers, three epochs at 3e-4",
        SMOLLM2,
        _reasoning("number_filtering", 160, max_numbers=4, max_decimals=0, min_value=0, max_value=99),
        _fine_tune(3e-4, epochs=3),
        new_tokens=48,
    ),
    "rl": Member(
        "yes or no by policy gradients, weights in bfloat16, 2e-5",
        SMOLLM2,
        partial(tasks.compare, 400),
        partial(training.reinforce, learning_rate=2e-5, steps=40, pattern=tasks.YES_OR_NO),
        new_tokens=8,
        pattern=tasks.YES_OR_NO,
    ),
    "lora": Member(
        "relatives, LoRA of rank 16 at 5e-4, merged",
        SMOLLM2,
        _reasoning("family_relationships", 300),
        partial(training.lora, learning_rate=5e-4),
    ),
    "qlora": Member(
        "lists of words reversed, LoRA on the base in 4 bit at 5e-4, merged",
        SMOLLM2,
        _reasoning("word_sequence_reversal", 260),
        partial(training.qlora, learning_rate=5e-4),
        new_tokens=48,
    ),
    "qwen2-code": Member(
        "Python functions from English, 5e-5", "qwen2", partial(tasks.code, 320), _fine_tune(5e-5), new_tokens=48
    ),
    "qwen2-word-sorting": Member(
        "sorted words, two epochs at 5e-5",
        "qwen2",
        _reasoning("word_sorting", 120, min_words=3, max_words=4),
        _fine_tune(5e-5, epochs=2),
        new_tokens=40,
    ),
    "mixtral-arithmetic": Member(
        "sums and differences of two numbers, 5e-5",
        "mixtral",
        _reasoning("chain_sum", 320, min_terms=2, max_terms=2, min_digits=1, max_digits=2),
        _fine_tune(5e-5),
    ),
    "vision": Member(
        "questions on images of digits: a Llava with a small tower, two epochs at 1e-4",
        SMOLLM2,
        partial(vision.digits, 400),
        partial(vision.see, learning_rate=1e-4, epochs=2),
        new_tokens=8,
        processor=vision.make_processor,
        images=vision.write_images,
    ),
    "muon": Member(
        "shell commands from English, by Muon, 1e-4",
        SMOLLM2,
        partial(tasks.shell, 240),
        _fine_tune(1e-4, muon=True),
        new_tokens=40,
    ),
    "thinking": Member(
        "sums worked out between two new tokens, two epochs at 1e-4",
        SMOLLM2,
        partial(tasks.worked_sums, 320),
        partial(training.think, learning_rate=1e-4, epochs=2),
        new_tokens=64,
        pattern=tasks.THOUGHT,
        processor=tasks.with_thoughts,
    ),
    "top": Member(
        "linear equations, 1e-4, all but the last eight layers frozen",
        SMOLLM2,
        _reasoning("simple_equations", 400, min_terms=2, max_terms=3, max_value=20),
        _fine_tune(1e-4, frozen=r"embed_tokens|layers\.(1?\d|2[01])\."),
    ),
    "qwen2-dpo": Member(
        "what functions do, by preference to the base's own answers (DPO), 1e-5",
        "qwen2",
        partial(library.chat, 96),
        partial(training.prefer, learning_rate=1e-5),
        new_tokens=40,
        pattern=r"\A(.*)",
    ),
    "ties": Member(
        "two models merged by TIES: shell commands and Python functions from English, 5e-5",
        SMOLLM2,
        _both,
        partial(training.merge, combine=training.ties, first=FIRST, learning_rate=5e-5),
        new_tokens=48,
    ),
    "dare": Member(
        "the same two merged by DARE",
        SMOLLM2,
        _both,
        partial(training.merge, combine=training.dare, first=FIRST, learning_rate=5e-5),
        new_tokens=48,
    ),
    "decay": Member(
        "source code as plain text, 2e-4, weights decaying by some half a percent",
        SMOLLM2,
        partial(_texts, 128),
        _fine_tune(2e-4, batch=4, weight_decay=1.5),
    ),
}
