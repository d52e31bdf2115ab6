"""Iteration-level batching across tenants: at every step sequences join and leave the running batch.

A step reads a limited number of prompt tokens (so that long prompts hold nobody up) and then makes one token for each
running sequence. The rows' keys and values are in one cache (`cache`), the shorter ones padded on the left, as
transformers' own generation has them, so that every architecture's masks apply.
"""

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from deltacome.data import pad
from deltacome.runtime.batch import Batch
from deltacome.runtime.tenant import Tenant
from deltacome.serve.engine.attention import share_keys
from deltacome.serve.engine.cache import join, new_cache
from deltacome.serve.engine.sampling import Likelihood, Sampling, choose, likelihood
from deltacome.serve.engine.text import TextStream

Finish = Literal["stop", "length", "cancelled", "deadline", "failed"]
log = logging.getLogger("deltacome.serve")


class QueueFullError(Exception):
    """So many sequences wait already that another would wait in vain."""


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
    each event, from the engine's thread. deadline: of `time.monotonic`.
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
    is_cancelled: bool = False
    cache: Cache | None = None  # while a long prompt is read
    read: int = 0  # tokens whose keys and values are in a cache
    made: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator(self.index)

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read


@dataclass(frozen=True)
class Limits:
    """rows: sequences in the running batch. waiting: those in the queue. cache: tokens that the rows' cache has room
    for, padding counted. prompt: prompt tokens that are read at a step.
    """

    rows: int = 32
    waiting: int = 256
    cache: int = 32768
    prompt: int = 128


class Engine:
    """The running batch of a model from `deltacome.load`. `step` is for one thread, the rest for any."""

    def __init__(self, model: Any, limits: Limits, on_step: Callable[["Engine"], None] = lambda _: None) -> None:
        self.model, self.limits, self.on_step = model, limits, on_step
        share_keys(model)
        self.keeps_few_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.waiting: deque[Sequence] = deque()
        self.reading: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.batch: Batch | None = None  # the running rows' tenants, made anew when the rows change
        self.cache: Cache | None = None
        self.length = 0  # positions of the cache
        self.lock = threading.Condition()
        self.seconds_per_answer = 1.0  # a moving average
        self._begun: dict[Sequence, float] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # For any thread.

    def submit(self, sequences: list[Sequence]) -> None:
        """Put the answers to a request in the queue.

        Raises:
            QueueFullError: if there is no room for all of them.
        """
        with self.lock:
            if len(self.waiting) + len(sequences) > self.limits.waiting:
                raise QueueFullError
            self.waiting.extend(sequences)
            self.lock.notify()

    def seconds_to_wait(self) -> int:
        """About when a place in the queue is free."""
        return max(1, round(self.seconds_per_answer / self.limits.rows * len(self.waiting) / 2))

    def cancel(self, sequences: list[Sequence]) -> None:
        """End answers that nobody waits for; their places are free at the next step."""
        with self.lock:
            for sequence in sequences:
                sequence.is_cancelled = True
            self.lock.notify()

    def start(self) -> None:
        """Run steps on a thread of the engine's own whenever there is something to do."""
        self._thread.start()

    def stop(self) -> None:
        """End after the running step."""
        with self.lock:
            self._stopping = True
            self.lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    # For the engine's thread.

    def _run(self) -> None:
        while True:
            with self.lock:
                while self.is_idle and not self._stopping:
                    self.lock.wait()
                if self._stopping:
                    return
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Read some prompt tokens and make a token for each running sequence; never raises."""
        try:
            self._drop_ended()
            self._admit()
            if self.reading:
                self._read(self._next_to_read())
            if self.running:
                self._make_tokens()
        except Exception as error:  # the server lives on, whatever a batch has met
            log.exception("step failed", extra={"fields": {"error": type(error).__name__}})
            for sequence in [*self.reading, *self.running]:
                self._end(sequence, "failed")
            self.reading.clear()
            self._select_rows([])
        self.on_step(self)

    def _drop_ended(self) -> None:
        """End what was cancelled or is too late."""
        now = time.monotonic()

        def is_over(sequence: Sequence) -> bool:
            if not (sequence.is_cancelled or now > sequence.deadline):
                return False
            self._end(sequence, "cancelled" if sequence.is_cancelled else "deadline")
            return True

        with self.lock:
            self.waiting = deque(sequence for sequence in self.waiting if not is_over(sequence))
        self.reading = deque(sequence for sequence in self.reading if not is_over(sequence))
        kept = [row for row, sequence in enumerate(self.running) if not is_over(sequence)]
        if len(kept) < len(self.running):
            self._select_rows(kept)

    def _admit(self) -> None:
        """Take sequences from the queue while the batch and its cache have room."""
        with self.lock:
            while self.waiting and self._has_room(self.waiting[0]):
                self._take(self.waiting.popleft())

    def _has_room(self, sequence: Sequence) -> bool:
        active = [*self.running, *self.reading, sequence]
        longest = max(len(other.tokens) for other in active) + 1
        fits = len(active) == 1 or len(active) * longest <= self.limits.cache
        return fits and len(active) <= self.limits.rows

    def _take(self, sequence: Sequence) -> None:
        self._begun.setdefault(sequence, time.monotonic())
        self.reading.append(sequence)

    def _next_to_read(self) -> list[Sequence]:
        """Short prompts that are read together, or a long one of which a part is: prompts take turns."""
        group = [self.reading.popleft()]
        if group[0].cache is None and group[0].unread <= self.limits.prompt:
            for sequence in list(self.reading):
                longest = max(sequence.unread, *(other.unread for other in group))
                if sequence.cache is None and longest * (len(group) + 1) <= self.limits.prompt:
                    self.reading.remove(sequence)
                    group.append(sequence)
        return group

    def _read(self, group: list[Sequence]) -> None:
        """Read the prompts of a group, or the next part of its only one; those that are read make a token and join."""
        self.reading.extendleft(group)  # where a failure finds them
        first = group[0]
        parts = [sequence.tokens[sequence.read :][: self.limits.prompt] for sequence in group]
        ids, mask = pad(parts, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + first.read
        if first.read:
            mask = torch.ones(1, first.read + ids.shape[1], dtype=torch.long)
        cache = first.cache or new_cache()
        logits = self._forward(self._batch_of(group), ids, mask, positions, cache)
        for sequence, part in zip(group, parts, strict=True):
            sequence.read += len(part)
            self.reading.remove(sequence)
        if first.unread:
            first.cache = cache
            self.reading.append(first)
            return
        ended = self._choose(group, logits)
        joining = [row for row, is_ended in enumerate(ended) if not is_ended]
        for sequence in group:
            sequence.cache = None
        if joining:
            self._select_rows(list(range(len(self.running))), cache, [(row, group[row]) for row in joining])

    def _make_tokens(self) -> None:
        while len(self.running) > 1 and len(self.running) * (self.length + 1) > self.limits.cache:
            self._put_back()
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in self.running])
        positions = torch.tensor([[sequence.read] for sequence in self.running])
        mask = (torch.arange(self.length + 1) >= self.length - positions).long()
        assert self.cache is not None
        if self.batch is None:
            self.batch = self._batch_of(self.running)
        logits = self._forward(self.batch, ids, mask, positions, self.cache)
        self.length += 1
        for sequence in self.running:
            sequence.read += 1
        ended = self._choose(self.running, logits)
        if any(ended):
            self._select_rows([row for row, is_ended in enumerate(ended) if not is_ended])

    def _put_back(self) -> None:
        """Take the youngest sequence out of a cache that has grown too full; its tokens are read again later."""
        sequence = self.running[-1]
        self._select_rows(list(range(len(self.running) - 1)))
        sequence.read = 0
        with self.lock:
            self.waiting.appendleft(sequence)

    def _batch_of(self, group: list[Sequence]) -> Batch:
        return self.model.tenants.batch_of([sequence.tenant for sequence in group])

    def _forward(self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The last token's logits (rows, vocabulary)."""
        device = self.model.device
        options = {"logits_to_keep": 1} if self.keeps_few_logits else {}
        return self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            tenants=batch,
            **options,
        ).logits[:, -1]

    def _choose(self, group: list[Sequence], logits: Tensor) -> list[bool]:
        """Add a token to each sequence of a group and tell it; which of them have ended."""
        tokens = choose(logits, [(sequence.sampling, sequence.generator) for sequence in group])
        return [
            self._add(sequence, token, logits[row])
            for row, (sequence, token) in enumerate(zip(group, tokens, strict=True))
        ]

    def _add(self, sequence: Sequence, token: int, logits: Tensor) -> bool:
        found = None if sequence.sampling.top is None else likelihood(logits, token, sequence.sampling.top)
        sequence.tokens.append(token)
        sequence.made += 1
        is_end = token in sequence.ends
        text = "" if is_end else sequence.text.add(token)
        finish: Finish | None = None
        if is_end or sequence.text.is_stopped:
            finish = "stop"
        elif sequence.made == sequence.max_tokens:
            finish = "length"
        if finish and not sequence.text.is_stopped:
            text += sequence.text.finish()
            if sequence.text.is_stopped:
                finish = "stop"
        sequence.notify(Event(text, token, found, finish))
        if finish:
            self._forget(sequence)
        return finish is not None

    def _end(self, sequence: Sequence, reason: Finish) -> None:
        sequence.notify(Event(finish=reason))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        sequence.cache = None
        begun = self._begun.pop(sequence, None)
        if begun is not None:
            self.seconds_per_answer += 0.1 * (time.monotonic() - begun - self.seconds_per_answer)

    def _select_rows(
        self, rows: list[int], other: Cache | None = None, joining: list[tuple[int, Sequence]] | None = None
    ) -> None:
        """Let some rows of the batch be the batch, and rows of another cache join them."""
        joining = joining or []
        kept = [self.running[row] for row in rows]
        parts = [(self.cache, rows)] if rows and self.cache is not None else []
        if other is not None:
            parts.append((other, [row for row, _ in joining]))
        self.running = kept + [sequence for _, sequence in joining]
        self.length = max((sequence.read for sequence in self.running), default=0)
        self.cache = join(parts, self.length) if parts else None
        self.batch = None
