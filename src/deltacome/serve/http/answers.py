"""The answers to one request: submitted, awaited or streamed, and their places given back whatever happens."""

import asyncio
import time
from collections.abc import AsyncIterator

from deltacome.serve.engine.sampling import Sampling
from deltacome.serve.engine.scheduler import Engine, Event, Finish, Sequence
from deltacome.serve.engine.text import TextStream
from deltacome.serve.http.protocol import ApiError, Usage
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Loaded, Registry

FAILURES: dict[Finish, tuple[int, str, str]] = {
    "deadline": (504, "the request took longer than this server allows", "deadline_exceeded"),
    "failed": (500, "the server failed at this request; its log says how", "internal_error"),
    "cancelled": (499, "the client has gone away", "cancelled"),
}


class Answers:
    """One request's answers, `prompts` times `choices` of them, numbered in that order.

    The lease of the model is given back when the last of them has ended, not when somebody has read it.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        name: str,
        loaded: Loaded,
        prompts: list[list[int]],
        *,
        choices: int,
        max_tokens: list[int],
        sampling: Sampling,
        stop: list[str],
        ends: set[int],
        started: float,
        deadline: float,
    ) -> None:
        self.engine, self.registry, self.metrics = engine, registry, metrics
        self.name, self.loaded, self.tokenizer = name, loaded, loaded.language.tokenizer
        self.prompt_tokens = sum(map(len, prompts))
        self.generated = 0
        self.status = "ok"
        self.started = started
        self.first: float | None = None
        self.last = started
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = len(prompts) * choices
        self.ended = asyncio.Event()
        self._release: asyncio.Task[None] | None = None
        self.sequences = [
            Sequence(
                loaded.tenant,
                list(prompts[index // choices]),
                max_tokens[index // choices],
                ends,
                sampling,
                TextStream(loaded.language.tokenizer, stop),
                lambda event, index=index: self._from_engine(index, event),  # type: ignore[misc]
                deadline,
                index,
            )
            for index in range(self._left)
        ]

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
        self.metrics.requests.labels(self.name, self.status).inc()
        self.metrics.prompt_tokens.labels(self.name).inc(self.prompt_tokens)
        self.metrics.tokens.labels(self.name).inc(self.generated)
        if self.first is not None:
            self.metrics.first.labels(self.name).observe(self.first - self.started)
            if self.generated > len(self.sequences):
                steps = self.generated / len(self.sequences) - 1
                self.metrics.each.labels(self.name).observe((self.last - self.first) / steps)
        self._release = self._loop.create_task(self.registry.release(self.loaded))
        self.ended.set()

    def cancel(self) -> None:
        """Free their places; nobody reads on."""
        self.engine.cancel(self.sequences)

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
    def usage(self) -> Usage:
        """So far."""
        total = self.prompt_tokens + self.generated
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.generated, total_tokens=total)
