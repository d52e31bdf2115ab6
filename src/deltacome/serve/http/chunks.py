"""Answers as the API's objects: whole, or in chunks as they come."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pydantic import BaseModel

from deltacome.serve.engine.sequence import Event
from deltacome.serve.http.answers import Answers
from deltacome.serve.http.protocol import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
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
        return self._completion(choices, usage=self.answers.usage)

    async def stream(self) -> AsyncIterator[Completion]:
        async for index, event in self.answers.events():
            yield self._completion([self._choice(index, [event])])

    def usage(self) -> Completion:
        return self._completion([], usage=self.answers.usage)


class ChatChunks:
    """/v1/chat/completions."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.id, self.created = answers, f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

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

    async def whole(self) -> ChatCompletion:
        choices = []
        for index, events in enumerate(await _collect(self.answers)):
            message = Answer(role="assistant", content="".join(event.text for event in events))
            logprobs, finish = self._logprobs(index, events), events[-1].finish
            choices.append(ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish))
        name, usage = self.answers.name, self.answers.usage
        return ChatCompletion(id=self.id, created=self.created, model=name, choices=choices, usage=usage)

    async def stream(self) -> AsyncIterator[ChatChunk]:
        for index in range(len(self.answers.sequences)):
            yield self._chunk([ChatChunkChoice(index=index, delta=Answer(role="assistant", content=""))])
        async for index, event in self.answers.events():
            delta, logprobs = Answer(content=event.text), self._logprobs(index, [event])
            yield self._chunk(
                [ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=event.finish)]
            )

    def usage(self) -> ChatChunk:
        return self._chunk([], usage=self.answers.usage)


def _finite(logprob: float) -> float:
    """JSON has no infinity; the API says -9999 of what cannot be."""
    return max(logprob, -9999.0)


async def _collect(answers: Answers) -> list[list[Event]]:
    """The events of each answer, to the end."""
    found: list[list[Event]] = [[] for _ in answers.sequences]
    async for index, event in answers.events():
        found[index].append(event)
    return found
