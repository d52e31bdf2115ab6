"""An answer that is asked for, and what a step did for it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import Cache

from deltacome.runtime.batch import Batch
from deltacome.runtime.tenant import Tenant
from deltacome.serve.engine.sampling import Likelihood, Sampling
from deltacome.serve.engine.text import TextStream
from deltacome.serve.grammars import Matcher

Finish = Literal["stop", "length", "cancelled", "deadline", "failed", "too_complex"]


@dataclass(frozen=True)
class Event:
    """What a step did for a sequence. text: what can be given out. finish: why it ended, None while it goes on."""

    text: str = ""
    token: int | None = None
    likelihood: Likelihood | None = None
    finish: Finish | None = None


@dataclass(eq=False)
class Sequence:
    """An answer that is asked for, and as far as it has got.

    tokens: the prompt's, and those of the answer behind them. ends: tokens that end an answer. notify: called with
    each event, from the engine's thread. deadline: of `time.monotonic`. owner: who asks; owners and tenants take turns.
    matcher: where the answer is held to a grammar. tells_prompt: whether the likelihoods of the prompt's tokens behind
    the first are asked for too; they are in `prompt` when the answer's first token is made.
    """

    tenant: Tenant | None
    tokens: list[int]
    max_tokens: int
    ends: set[int]
    sampling: Sampling
    text: TextStream
    notify: Callable[[Event], None]
    deadline: float = float("inf")
    index: int = 0
    owner: Hashable = None
    matcher: Matcher | None = None
    tells_prompt: bool = False
    prompt: list[Likelihood] = field(default_factory=list)
    is_cancelled: bool = False
    cache: Cache | None = None  # until the whole prompt is read
    batch: Batch | None = None  # as long
    read: int = 0  # tokens whose keys and values are in a cache
    recalled: int = 0  # of the prompt's tokens, those that did not have to be read
    made: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator(self.index)

    @property
    def answer(self) -> list[int]:
        """Tokens of the answer so far."""
        return self.tokens[len(self.tokens) - self.made :]

    @property
    def reads_prompt_aloud(self) -> bool:
        """Whether the logits of all tokens that are read are needed."""
        return self.tells_prompt and not self.made

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read
