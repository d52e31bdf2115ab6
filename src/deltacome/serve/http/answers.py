"""The answers to one request: submitted, awaited or streamed, and their places given back whatever happens."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from deltacome.serve.engine.sampling import Sampling
from deltacome.serve.engine.sequence import Event, Finish, Sequence
from deltacome.serve.engine.text import TextStream
from deltacome.serve.grammars import Matcher
from deltacome.serve.http.errors import ApiError
from deltacome.serve.http.keys import Allowed
from deltacome.serve.http.prompts import Prepared
from deltacome.serve.http.protocol import GenerationRequest, PromptTokens, Usage
from deltacome.serve.http.service import Service
from deltacome.serve.registry import Loaded

FAILURES: dict[Finish, tuple[int, str, str]] = {
    "deadline": (504, "the request took longer than this server allows", "deadline_exceeded"),
    "failed": (500, "the server failed at this request; its log says how", "internal_error"),
    "too_complex": (400, "the answer's schema takes too much to keep to; make it simpler", "schema_too_complex"),
    "cancelled": (499, "the client has gone away", "cancelled"),
}


class Answers:
    """One request's answers, `n` of them to each prompt, numbered in that order.

    matcher: of the grammar that each is held to, at its beginning. started: when the request came, of
    `time.monotonic`. give_back: called when the last of them has ended, not when somebody has read it: of the model's
    lease and what else a running request takes.
    """

    def __init__(
        self,
        service: Service,
        body: GenerationRequest,
        key: Allowed,
        loaded: Loaded,
        prepared: Prepared,
        matcher: Matcher | None,
        started: float,
        give_back: Callable[[], None],
    ) -> None:
        self.key, self.give_back = key, give_back
        self.service, self.loaded, self.tokenizer = service, loaded, loaded.language.tokenizer
        self.name, self.calls = body.model, prepared.calls
        self.prompt_tokens = sum(map(len, prepared.prompts))
        self.generated = 0
        self.status = "ok"
        self.started = started
        self.first: float | None = None
        self.last = started
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.echoed = [text for text in prepared.texts for _ in range(body.n or 1)]
        every = [prompt for prompt in prepared.prompts for _ in range(body.n or 1)]
        self.sequences = [self._sequence(index, prompt, body, matcher) for index, prompt in enumerate(every)]
        self._firsts = self.sequences[:: body.n or 1]  # of each prompt
        self._left = len(self.sequences)

    def _sequence(self, index: int, prompt: list[int], body: GenerationRequest, matcher: Matcher | None) -> Sequence:
        return Sequence(
            self.loaded.tenant,
            list(prompt),
            body.answer_tokens or self.service.max_length - len(prompt),
            set() if body.ignore_eos else self.loaded.language.ends,
            Sampling(
                1.0 if body.temperature is None else body.temperature,
                1.0 if body.top_p is None else body.top_p,
                body.seed,
                body.likeliest,
                body.biases,
                body.frequency_penalty or 0.0,
                body.presence_penalty or 0.0,
            ),
            TextStream(self.tokenizer, body.stops, {} if self.calls is None else self.calls.marks),
            partial(self._from_engine, index),
            self.started + self.service.deadline,
            index,
            owner=self.key,
            matcher=None if matcher is None else matcher.copy(),
            tells_prompt=bool(self.echoed) and body.likeliest is not None,
        )

    def reject(self) -> None:
        """The engine does not take them."""
        self.status = "rejected"
        self._finish()

    def _from_engine(self, index: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._take, index, event)

    def _take(self, index: int, event: Event) -> None:
        now = time.monotonic()
        if event.token is not None:
            self.generated += 1
            self.last = now
            if self.first is None:
                self.first = now
        self._events.put_nowait((index, event))
        if event.finish is not None:
            if event.finish in FAILURES:
                self.status = event.finish
            self._left -= 1
            if not self._left:
                self._finish()

    def _finish(self) -> None:
        metrics = self.service.metrics
        label = metrics.label(self.name)
        metrics.requests.labels(label, self.status).inc()
        metrics.prompt_tokens.labels(label).inc(self.prompt_tokens)
        metrics.recalled_tokens.labels(label).inc(self.recalled_tokens)
        metrics.tokens.labels(label).inc(self.generated)
        if self.first is not None:
            metrics.first_token_seconds.labels(label).observe(self.first - self.started)
            if self.generated > len(self.sequences):
                steps = self.generated / len(self.sequences) - 1
                metrics.seconds_per_token.labels(label).observe((self.last - self.first) / steps)
        self.give_back()
        self.ended.set()

    def cancel(self) -> None:
        """Free their places; nobody reads on."""
        self.service.engine.cancel(self.sequences)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, with the number of the answer that it happens to.

        Raises:
            ApiError: if an answer ends without being complete.
        """
        left = len(self.sequences)
        try:
            while left:
                index, event = await self._events.get()
                if event.finish in FAILURES:
                    status, message, code = FAILURES[event.finish]
                    raise ApiError(status, message, code=code)
                left -= event.finish is not None
                yield index, event
        finally:
            if left:
                self.cancel()

    @property
    def recalled_tokens(self) -> int:
        """Those of the prompts that were found in the prefix cache."""
        return sum(sequence.recalled for sequence in self._firsts)

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            total_tokens=self.prompt_tokens + self.generated,
            prompt_tokens_details=PromptTokens(cached_tokens=self.recalled_tokens),
        )
