"""Answers as the API's objects: whole, or in chunks as they come."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pydantic import BaseModel

from deltacome.serve.calls import CallPart
from deltacome.serve.engine.sequence import Event
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
            logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
            offset = self.offsets[index]
            for event in events:
                if event.token is not None and event.likelihood is not None:
                    own, top = event.likelihood.logprob, event.likelihood.top
                    pieces = self.answers.loaded.language.pieces
                    found = pieces.by_text(event.token, own, top)
                    logprobs.tokens.append(pieces.text_of(event.token))
                    logprobs.token_logprobs.append(_finite(own))
                    logprobs.top_logprobs.append({text: _finite(value) for text, value in found.items()})
                    logprobs.text_offset.append(offset)
                offset += len(event.text)
            self.offsets[index] = offset
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=events[-1].finish)

    def _completion(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.answers.name, choices=choices, **fields)

    async def whole(self) -> Completion:
        found = await _collect(self.answers)
        choices = [self._choice(index, events) for index, events in enumerate(found)]
        for choice, text in zip(choices, self.answers.echoed, strict=False):
            choice.text = text + choice.text
        return self._completion(choices, usage=self.answers.usage)

    async def stream(self) -> AsyncIterator[Completion]:
        for index, text in enumerate(self.answers.echoed):
            yield self._completion([CompletionChoice(index=index, text=text)])
        async for index, event in self.answers.events():
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
