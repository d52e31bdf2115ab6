"""Answers as the API's objects: whole, or in chunks as they come."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pydantic import BaseModel

from deltacome.serve.call_stream import CallPart
from deltacome.serve.engine.sampling import Likelihood
from deltacome.serve.engine.sequence import Event
from deltacome.serve.engine.text import TextStream
from deltacome.serve.http.answers import Answers
from deltacome.serve.http.protocol import (
    Answer,
    Call,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FunctionDelta,
    FunctionOfCall,
    Logprob,
    TokenLogprob,
)


class Chunks(Protocol):
    """One request's answers in the form of an endpoint."""

    answers: Answers
    id: str

    async def whole(self) -> BaseModel: ...

    def stream(self) -> AsyncIterator[BaseModel]: ...

    def usage(self) -> BaseModel:
        """The last chunk of a stream that ends with the usage."""
        ...


class CompletionChunks:
    """/v1/completions."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.id, self.created = answers, f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.offsets = [0] * len(answers.sequences)

    def _choice(self, index: int, events: list[Event]) -> CompletionChoice:
        text = "".join(event.text for event in events)
        logprobs = None
        if self.answers.sequences[index].sampling.top is not None:
            logprobs = _no_logprobs()
            for event in events:
                if event.token is not None and event.likelihood is not None:
                    self._add(logprobs, index, event.token, event.likelihood)
                self.offsets[index] += len(event.text)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=events[-1].finish)

    def _add(self, logprobs: CompletionLogprobs, index: int, token: int, likelihood: Likelihood | None) -> None:
        pieces = self.answers.loaded.language.pieces
        logprobs.tokens.append(pieces.text_of(token))
        logprobs.text_offset.append(self.offsets[index])
        if likelihood is None:
            logprobs.token_logprobs.append(None)
            logprobs.top_logprobs.append(None)
        else:
            found = pieces.by_text(token, likelihood.logprob, likelihood.top)
            logprobs.token_logprobs.append(_finite(likelihood.logprob))
            logprobs.top_logprobs.append({text: _finite(value) for text, value in found.items()})

    def _echo(self, index: int) -> CompletionChoice:
        """The prompt of an answer that has a token; nothing is known of how likely the first one is."""
        sequence, logprobs = self.answers.sequences[index], None
        if sequence.tells_prompt:
            logprobs, text = _no_logprobs(), TextStream(self.answers.tokenizer, [])
            known = [None, *sequence.prompt]
            for token, likelihood in zip(sequence.tokens, known, strict=False):
                self._add(logprobs, index, token, likelihood)
                self.offsets[index] += len(text.add(token))
        self.offsets[index] = len(self.answers.echoed[index])
        return CompletionChoice(index=index, text=self.answers.echoed[index], logprobs=logprobs)

    def _completion(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.answers.name, choices=choices, **fields)

    async def whole(self) -> Completion:
        found = await _collect(self.answers)
        choices = []
        for index, events in enumerate(found):
            echo = self._echo(index) if self.answers.echoed else None
            choice = self._choice(index, events)
            if echo is not None:
                choice.text = echo.text + choice.text
                if echo.logprobs is not None and choice.logprobs is not None:
                    choice.logprobs = echo.logprobs.followed_by(choice.logprobs)
            choices.append(choice)
        return self._completion(choices, usage=self.answers.usage)

    async def stream(self) -> AsyncIterator[Completion]:
        unsaid = set(range(len(self.answers.echoed)))
        async for index, event in self.answers.events():
            if index in unsaid:
                unsaid.remove(index)
                yield self._completion([self._echo(index)])
            yield self._completion([self._choice(index, [event])])

    def usage(self) -> Completion:
        return self._completion([], usage=self.answers.usage)


class ChatChunks:
    """/v1/chat/completions."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.id, self.created = answers, f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.calls = [answers.calls.stream() for _ in answers.sequences] if answers.calls is not None else None

    def _logprobs(self, index: int, events: list[Event]) -> ChatLogprobs | None:
        if self.answers.sequences[index].sampling.top is None:
            return None
        content = []
        for event in events:
            if event.token is not None and event.likelihood is not None:
                top = [self._logprob(token, value) for token, value in event.likelihood.top]
                own = self._logprob(event.token, event.likelihood.logprob)
                content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _logprob(self, token: int, value: float) -> Logprob:
        pieces = self.answers.loaded.language.pieces
        found = pieces.bytes_of(token)
        return Logprob(
            token=pieces.text_of(token), logprob=_finite(value), bytes=None if found is None else list(found)
        )

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.answers.name, choices=choices, **fields)

    def _said(self, index: int, events: list[Event]) -> tuple[str, list[CallPart], str | None]:
        """What more of an answer says: text and parts of calls, and why it ended."""
        text, finish = "".join(event.text for event in events), events[-1].finish
        if self.calls is None:
            return text, [], finish
        stream = self.calls[index]
        said = [stream.add(text), *([stream.finish()] if finish else [])]
        parts = [part for each in said for part in each.calls]
        reason = "tool_calls" if finish == "stop" and stream.count else finish
        return "".join(each.text for each in said), parts, reason

    async def whole(self) -> ChatCompletion:
        choices = []
        for index, events in enumerate(await _collect(self.answers)):
            text, parts, finish = self._said(index, events)
            calls = [_call(part) for part in parts] or None
            message = Answer(content=text or None if calls else text, tool_calls=calls)
            choices.append(
                ChatChoice(index=index, message=message, logprobs=self._logprobs(index, events), finish_reason=finish)
            )
        name, usage = self.answers.name, self.answers.usage
        return ChatCompletion(id=self.id, created=self.created, model=name, choices=choices, usage=usage)

    async def stream(self) -> AsyncIterator[ChatChunk]:
        for index in range(len(self.answers.sequences)):
            yield self._chunk([ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))])
        async for index, event in self.answers.events():
            text, parts, finish = self._said(index, [event])
            calls = [_call_delta(part) for part in parts] or None
            delta = Delta(content=text if text or not calls else None, tool_calls=calls)
            logprobs = self._logprobs(index, [event])
            yield self._chunk([ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)])

    def usage(self) -> ChatChunk:
        return self._chunk([], usage=self.answers.usage)


def _call(part: CallPart) -> Call:
    """Of a part that is all of it."""
    assert part.id is not None and part.name is not None
    return Call(id=part.id, function=FunctionOfCall(name=part.name, arguments=part.arguments))


def _call_delta(part: CallPart) -> CallDelta:
    function = FunctionDelta(name=part.name, arguments=part.arguments)
    return CallDelta(index=part.index, id=part.id, type="function" if part.id else None, function=function)


def _finite(logprob: float) -> float:
    """JSON has no infinity; the API says -9999 of what cannot be."""
    return max(logprob, -9999.0)


async def _collect(answers: Answers) -> list[list[Event]]:
    """The events of each answer, to the end."""
    found: list[list[Event]] = [[] for _ in answers.sequences]
    async for index, event in answers.events():
        found[index].append(event)
    return found


def _no_logprobs() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
