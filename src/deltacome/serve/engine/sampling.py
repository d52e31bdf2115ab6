"""How a token is chosen from a row of logits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token. seed: None for another answer every time. top: how many of the
    likeliest tokens to tell with each one's log-probability, None for no log-probabilities at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top: int | None = None

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
