"""How a token is chosen from a row of logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from deltacome.serve.grammars import GrammarError, Matcher


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. seed: None for another answer every time. top: how many of the
    likeliest tokens to tell with each one's log-probability, None for no log-probabilities at all. bias: added to
    tokens' logits. frequency, presence: taken from the logits of tokens that the answer has already, each time it has
    them, and once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    frequency: float = 0.0
    presence: float = 0.0

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether that is all."""
        return not (self.temperature or self.bias or self.frequency or self.presence)

    def generator(self, index: int) -> torch.Generator:
        """Random numbers of the answer with that index."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + index) % 2**63)
        return generator


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a chosen token, and the likeliest ones with theirs, the likeliest first."""

    logprob: float
    top: list[tuple[int, float]]


def choose(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, said: list[int], matcher: Matcher | None
) -> int:
    """A token for a row of logits (vocabulary,), the answer having said some, among those that may come next.

    Raises:
        GrammarError: if the matcher has none, or cannot tell.
    """
    scores = logits.float().cpu()
    if sampling.bias:
        tokens = torch.tensor(list(sampling.bias))
        scores = scores.index_add(0, tokens, torch.tensor(list(sampling.bias.values())))
    if said and (sampling.frequency or sampling.presence):
        tokens, counts = torch.tensor(said).unique(return_counts=True)
        scores = scores.index_add(0, tokens, -(sampling.frequency * counts + sampling.presence))
    if matcher is not None:
        scores = scores.masked_fill(~matcher.allowed(len(scores)), float("-inf"))
        if scores.max() == float("-inf"):
            raise GrammarError("no token may come next")
    return sample(scores, sampling, generator) if sampling.temperature > 0 else int(scores.argmax())


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token for a row of logits (vocabulary,), the temperature not being 0."""
    scores = logits.float().cpu()
    # However small the temperature, the likeliest stay at 0; float32 cannot hold all of them.
    scores = ((scores - scores.max()).double() / sampling.temperature).float()
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(torch.empty(1, 0, dtype=torch.long), scores[None])[0]
    return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator))


def likelihood(logits: Tensor, token: int, top: int) -> Likelihood:
    """Of a token in a row of logits (vocabulary,), without temperature."""
    logprobs = torch.log_softmax(logits.float(), -1)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    return Likelihood(float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
