"""Iteration-level batching across tenants: at every step sequences join and leave the running batch.

A step reads a limited number of prompt tokens (so that long prompts hold nobody up) and then makes one token for each
running sequence. Keys and values of rows of about the same length are in one cache (`rows`, `cache`), the shorter ones
padded on the left, as transformers' own generation has them, so that every architecture's masks apply.
"""

import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from deltacome.data import pad
from deltacome.errors import DeltacomeError
from deltacome.memory import is_out_of_memory
from deltacome.runtime.batch import Batch
from deltacome.serve.engine.attention import share_keys
from deltacome.serve.engine.cache import bytes_per_position, join, new_cache, rewind
from deltacome.serve.engine.prefixes import Prefixes
from deltacome.serve.engine.queue import FairQueue
from deltacome.serve.engine.rows import Part, Rows, arranged, cache_positions, joined
from deltacome.serve.engine.sampling import choose, likelihood
from deltacome.serve.engine.sequence import Event, Finish, Sequence
from deltacome.serve.grammars import GrammarError

ALOUD = 128  # tokens whose logits are there at once
LONG = 4  # times what a step reads: prompts that are longer go by smaller parts
log = logging.getLogger("deltacome.serve")


class QueueFullError(Exception):
    """So many sequences wait already that another would wait in vain."""


@dataclass(frozen=True)
class Limits:
    """rows: sequences in the running batch. waiting: those in the queue. cache: tokens that the rows' cache has room
    for, padding counted. prompt: prompt tokens that are read at a step. prefixes: tokens of prompts and answers that
    are kept for later prompts, 0 for none.
    """

    rows: int = 32
    waiting: int = 256
    cache: int = 32768
    prompt: int = 128
    prefixes: int = 16384


class Engine:
    """The running batch of a model from `deltacome.load`. `step` is for one thread, the rest for any.

    A row that fails, whatever the reason, ends with an event that says so, and the others go on. Where the memory has
    no room for all of them, some wait.

    room: tokens that the rows' cache may have: the limit, or less since a batch was too large for the memory.
    """

    def __init__(self, model: Any, limits: Limits, on_step: Callable[["Engine"], None] = lambda _: None) -> None:
        self.model, self.limits, self.on_step = model, limits, on_step
        share_keys(model)
        self.keeps_few_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.waiting: FairQueue[Sequence] = FairQueue(lambda sequence: (sequence.owner, sequence.tenant))
        self.reading: deque[Sequence] = deque()
        self.batches: list[Rows] = []  # what runs, by length
        self.spare = math.inf  # positions of padding that cost less than another pass over the weights
        self.prefixes = Prefixes(limits.prefixes)
        self.room = limits.cache
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
        return not (self.waiting or self.reading or self.batches)

    @property
    def running(self) -> list[Sequence]:
        """Those whose prompts are read."""
        return [sequence for rows in self.batches for sequence in rows.sequences]

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
            if self.batches:
                self._make_tokens()
        except Exception as error:  # the server lives on, whatever a batch has met
            with self.lock:
                waiting = set(self.waiting)
            for sequence in self._begun.keys() - waiting:
                self._fail(sequence, error)
            self.reading.clear()
            self.batches = []
        if self.is_idle:
            self.room = self.limits.cache
            if self.prefixes.limit < self.limits.prefixes:
                self.prefixes = Prefixes(self.limits.prefixes)
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
            self.waiting.drop(is_over)
        self.reading = deque(sequence for sequence in self.reading if not is_over(sequence))
        self._go_on(self._all_but(is_over))

    def _admit(self) -> None:
        """Take sequences from the queue while the batch and its cache have room."""
        with self.lock:
            while (sequence := self.waiting.take(self._has_room)) is not None:
                self._take(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        active = [*self.running, *self.reading, sequence]
        fits = len(active) == 1 or self._room_for(active) <= self.room
        return fits and len(active) <= self.limits.rows

    def _room_for(self, sequences: list[Sequence]) -> int:
        """Positions of caches that hold all of them, and one token more of each."""
        return cache_positions(sequences, self.spare) + len(sequences)

    def _take(self, sequence: Sequence) -> None:
        self._begun.setdefault(sequence, time.monotonic())
        self.reading.append(sequence)

    def _next_to_read(self) -> list[Sequence]:
        """Prompts of which little is unread, together, or one of which a part is read: prompts take turns."""
        group = [self.reading.popleft()]
        self._recall(group[0])
        lengths = [len(group[0].tokens)]
        unread = group[0].unread
        if unread <= self._part_of(group[0]) and not group[0].reads_prompt_aloud:
            for sequence in list(self.reading):
                if sequence.reads_prompt_aloud:
                    continue
                length = len(sequence.tokens)
                widest = max(unread, length - self.prefixes.known(sequence))
                count = len(group) + 1
                padded = count * max(length, *lengths) - sum(lengths) - length
                if count * widest <= self.limits.prompt and padded <= sum(lengths) + length + self.limits.prompt:
                    self.reading.remove(sequence)
                    self._recall(sequence)
                    group.append(sequence)
                    lengths.append(length)
                    unread = widest
        return group

    def _part_of(self, sequence: Sequence) -> int:
        """Tokens of a prompt to read at a step: of a long one fewer, while answers wait for their next tokens."""
        if sequence.reads_prompt_aloud:
            return min(self.limits.prompt, ALOUD)
        most = self.limits.prompt
        is_long = len(sequence.tokens) > LONG * most
        return math.ceil(most / LONG) if is_long and self.batches else most

    def _read(self, group: list[Sequence]) -> None:
        """Read the prompts of a group, or the next part of its only one; those that are read make a token and join.

        Those with less to read than others begin earlier, reading some again, so that all padding is at the left.
        """
        first = group[0]
        most = self._part_of(first) if len(group) == 1 else self.limits.prompt
        ends = [min(len(sequence.tokens), sequence.read + most) for sequence in group]
        width = max(end - sequence.read for end, sequence in zip(ends, group, strict=True))
        begins = [max(0, end - width) for end in ends]
        parts = [sequence.tokens[begin:end] for sequence, begin, end in zip(group, begins, ends, strict=True)]
        ids, _ = pad(parts, left=True)
        behind = torch.arange(-width, 0) + torch.tensor(ends)[:, None]
        mask = (torch.arange(-max(begins) - width, 0) + torch.tensor(ends)[:, None] >= 0).long()
        try:
            cache = _cache_for(group, begins)
            batch = first.batch if len(group) == 1 and first.batch is not None else self._batch_of(group)
            logits = self._forward(batch, ids, mask, behind.clamp(min=0), cache, first.reads_prompt_aloud)
            if first.reads_prompt_aloud:
                logits = _tell_prompt(first, logits[0])
        except Exception as error:
            if len(group) == 1:
                self._give_up(group, error)
                return
            for sequence in group:
                self._read([sequence])
            return
        for row, (sequence, end) in enumerate(zip(group, ends, strict=True)):
            sequence.read = end
            self._keep(sequence, cache, row)
        if first.unread:
            first.cache, first.batch = cache, batch
            self.reading.append(first)
            return
        if self.spare == math.inf:
            self.spare = sum(own.nbytes for own in self.model.parameters()) / bytes_per_position(cache)
        joining = self._choose(group, logits, cache)
        if not joining:
            return
        try:
            self.batches = arranged([*self._all_but(lambda _: False), (Rows(group, cache), joining)], self.spare)
        except Exception as error:
            self._give_up([group[row] for row in joining], error)
            return
        for sequence in group:
            sequence.cache = sequence.batch = None

    def _make_tokens(self) -> None:
        while len(self.running) > 1 and cache_positions(self.running, self.spare) > self.room:
            youngest = max(self.running, key=self._begun.__getitem__)
            for rows in self.batches:
                if youngest in rows.sequences:
                    assert rows.cache is not None
                    self._keep(youngest, rows.cache, rows.sequences.index(youngest))
            others = self._all_but(partial(is_, youngest))
            self._put_back(youngest)
            self._go_on(others)
        self._go_on([part for rows in self.batches for part in self._advance(rows)])

    def _all_but(self, leaves: Callable[[Sequence], bool]) -> list[Part]:
        """What runs, without the sequences for which that is true."""
        return [(rows, [row for row, own in enumerate(rows.sequences) if not leaves(own)]) for rows in self.batches]

    def _go_on(self, parts: list[Part]) -> None:
        """Let those rows be what runs, or wait if there is no memory for copies of them."""
        try:
            self.batches = arranged(parts, self.spare)
        except Exception as error:
            self.batches = []
            self._give_up([rows.sequences[row] for rows, own in parts for row in own], error)

    def _advance(self, rows: Rows) -> list[Part]:
        """Make a token for each row; which rows go on, in parts if together they failed."""
        sequences, length = rows.sequences, rows.length
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in sequences])
        positions = torch.tensor([[sequence.read] for sequence in sequences])
        mask = (torch.arange(length + 1) >= length - positions).long()
        assert rows.cache is not None
        try:
            if rows.batch is None:
                rows.batch = self._batch_of(sequences)
            logits = self._forward(rows.batch, ids, mask, positions, rows.cache)
        except Exception as error:
            rewind(rows.cache, length)
            if len(sequences) == 1 or is_out_of_memory(error):  # which has no room for a copy of some rows either
                self._give_up(sequences, error)
                return []
            middle = len(sequences) // 2
            halves = joined([(rows, list(range(middle)))]), joined([(rows, list(range(middle, len(sequences))))])
            return [*self._advance(halves[0]), *self._advance(halves[1])]
        for sequence in sequences:
            sequence.read += 1
        return [(rows, self._choose(sequences, logits, rows.cache))]

    def _recall(self, sequence: Sequence) -> None:
        if sequence.reads_prompt_aloud:
            return
        with self._if_there_is_memory():
            self.prefixes.recall(sequence)

    def _keep(self, sequence: Sequence, cache: Cache, row: int) -> None:
        with self._if_there_is_memory():
            self.prefixes.keep(sequence, cache, row)

    @contextmanager
    def _if_there_is_memory(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._free_prefixes()

    def _free_prefixes(self) -> bool:
        """Keep no prefixes any more until the batch is empty; whether some were kept before."""
        had_room = self.prefixes.limit > 0
        self.prefixes = Prefixes(0)
        return had_room

    def _give_up(self, sequences: list[Sequence], error: Exception) -> None:
        """End sequences that failed; where memory is short and there are others or prefixes, let them wait for room."""
        others = [other for other in (*self.running, *self.reading) if other not in sequences]
        if is_out_of_memory(error) and (self._free_prefixes() or len(others) + len(sequences) > 1):
            room = max(self._room_for(others), self._room_for([*others, *sequences]) // 2)
            self.room = min(self.room, room)
            for sequence in reversed(sequences):
                self._put_back(sequence)
        else:
            for sequence in sequences:
                self._fail(sequence, error)

    def _put_back(self, sequence: Sequence) -> None:
        """Let a sequence wait again; its tokens are read again later."""
        sequence.read, sequence.cache, sequence.batch = 0, None, None
        if not sequence.made:
            sequence.recalled = 0
            sequence.prompt.clear()
        with self.lock:
            self.waiting.put_back(sequence)

    def _batch_of(self, group: list[Sequence]) -> Batch:
        return self.model.tenants.batch_of([sequence.tenant for sequence in group])

    def _forward(
        self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, all_tokens: bool = False
    ) -> Tensor:
        """The last token's logits (rows, vocabulary), or those of all of them (rows, tokens, vocabulary)."""
        device = self.model.device
        options = {"logits_to_keep": 1} if self.keeps_few_logits and not all_tokens else {}
        logits: Tensor = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            tenants=batch,
            **options,
        ).logits
        return logits if all_tokens else logits[:, -1]

    def _choose(self, group: list[Sequence], logits: Tensor, cache: Cache) -> list[int]:
        """Add a token to each sequence of a group and tell it; the rows of those that go on.

        What the others have read is kept, answers included: a conversation's next turn begins with it.
        """
        best, tokens = (found.tolist() for found in logits.max(-1))
        going_on = []
        for row, sequence in enumerate(group):
            try:
                if not math.isfinite(best[row]):
                    raise DeltacomeError("the model's logits are no numbers")
                token = tokens[row]
                if not sequence.sampling.takes_the_likeliest or sequence.matcher is not None:
                    token = choose(
                        logits[row], sequence.sampling, sequence.generator, sequence.answer, sequence.matcher
                    )
                if self._add(sequence, token, logits[row]):
                    self._keep(sequence, cache, row)
                else:
                    going_on.append(row)
            except GrammarError:
                self._end(sequence, "too_complex")
            except Exception as error:
                self._fail(sequence, error)
        return going_on

    def _add(self, sequence: Sequence, token: int, logits: Tensor) -> bool:
        found = None if sequence.sampling.top is None else likelihood(logits, token, sequence.sampling.top)
        sequence.tokens.append(token)
        sequence.made += 1
        is_end, matcher = token in sequence.ends, sequence.matcher
        if matcher is not None:
            matcher.add(token)
        text = "" if is_end else sequence.text.add(token)
        finish: Finish | None = None
        if is_end or sequence.text.is_stopped or (matcher is not None and matcher.is_complete):
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

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        name = None if sequence.tenant is None else sequence.tenant.name
        log.error("answer failed", exc_info=error, extra={"fields": {"tenant": name, "error": repr(error)}})
        self.prefixes.forget(sequence.tenant)
        self._end(sequence, "failed")

    def _end(self, sequence: Sequence, reason: Finish) -> None:
        self._forget(sequence)
        with suppress(Exception):  # whoever asked may be gone
            sequence.notify(Event(finish=reason))

    def _forget(self, sequence: Sequence) -> None:
        sequence.cache = sequence.batch = None
        begun = self._begun.pop(sequence, None)
        if begun is not None:
            self.seconds_per_answer += 0.1 * (time.monotonic() - begun - self.seconds_per_answer)


def _cache_for(group: list[Sequence], begins: list[int]) -> Cache:
    """A cache of what the sequences of a group have read up to those positions."""
    caches = [sequence.cache for sequence in group if sequence.cache is not None]
    if len(group) == 1 or not any(begins):
        return caches[0] if caches and any(begins) else new_cache()
    parts = [(sequence.cache or caches[0], [0], begin) for sequence, begin in zip(group, begins, strict=True)]
    return join(parts, max(begins))


def _tell_prompt(sequence: Sequence, logits: Tensor) -> Tensor:
    """Tell the likelihoods of the tokens behind those that were read, whose logits (tokens, vocabulary) these are.

    Returns:
        The last token's logits, (1, vocabulary).
    """
    top = sequence.sampling.top
    assert top is not None
    following = sequence.tokens[sequence.read + 1 : sequence.read + 1 + len(logits)]
    sequence.prompt += [likelihood(row, token, top) for row, token in zip(logits, following, strict=False)]
    return logits[-1:]
