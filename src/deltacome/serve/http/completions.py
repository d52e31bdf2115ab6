"""What happens to a request for answers: admission, the lease of its model, tokens, the engine, the answer or a stream.

The same for both endpoints, which differ in how a prompt is made and in the form of the answers.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from deltacome.errors import DeltacomeError
from deltacome.serve.engine.scheduler import QueueFullError
from deltacome.serve.grammars import GrammarError, Matcher
from deltacome.serve.http.answers import Answers
from deltacome.serve.http.chunks import ChatChunks, Chunks, CompletionChunks
from deltacome.serve.http.errors import ApiError, queue_full, quota_used, shutting_down, unknown_model
from deltacome.serve.http.keys import Allowed
from deltacome.serve.http.prompts import Prepared, prepare_chat, prepare_completion
from deltacome.serve.http.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    GenerationRequest,
)
from deltacome.serve.http.service import FromService, Key, Service
from deltacome.serve.registry import Loaded, NoRoomError, UnknownModelError
from deltacome.store.fetching import FetchError

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
Prepare = Callable[[Loaded], Prepared]
COMPILE_SECONDS = 10.0  # that a request waits for its grammar; one takes a second or two at most
log = logging.getLogger("deltacome.serve")
router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(request: Request, body: CompletionRequest, service: FromService, key: Key) -> Response:
    answers = await _begin(service, request, body, key, partial(prepare_completion, body))
    return await _respond(service, request, body, CompletionChunks(answers))


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(request: Request, body: ChatRequest, service: FromService, key: Key) -> Response:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    answers = await _begin(service, request, body, key, partial(prepare_chat, body))
    return await _respond(service, request, body, ChatChunks(answers))


async def _begin(
    service: Service, request: Request, body: GenerationRequest, key: Allowed, prepare: Prepare
) -> Answers:
    """The answers to a request, which the engine has in its queue.

    Raises:
        ApiError: if the request is refused.
    """
    started = time.monotonic()
    if service.is_draining:
        raise shutting_down()
    if body.model not in key:
        raise unknown_model(body.model)
    engine = service.engine
    if len(service.arriving) + len(engine.waiting) >= engine.limits.waiting:
        raise queue_full(engine.seconds_to_wait())
    with ExitStack() as until_answered:  # if that is not reached, all is given back at once
        if not key.begin():
            raise quota_used(key.most, engine.seconds_to_wait())
        until_answered.callback(key.end)
        loaded = await lease(service, request, body.model)
        until_answered.callback(service.registry.release, loaded)
        try:
            prepared = await asyncio.to_thread(prepare, loaded)
            matcher = None if prepared.grammar is None else await _compile(service, loaded, prepared.grammar)
        except GrammarError as error:
            raise ApiError(400, f"the schema cannot be kept to: {error}", code="invalid_schema") from error
        prompts = prepared.prompts
        biased = max(body.biases, default=0)
        if biased >= loaded.vocabulary:
            message = f"logit_bias holds token {biased}; this model has {loaded.vocabulary}"
            raise ApiError(400, message, param="logit_bias")
        _check(prompts, body.answer_tokens, service.max_length, loaded.vocabulary)
        if len(prompts) * (body.n or 1) > engine.limits.waiting:
            raise ApiError(
                400,
                f"this asks for {len(prompts) * (body.n or 1)} answers, and the server's queue has room for "
                f"{engine.limits.waiting}: send fewer prompts at once, or a smaller n",
                param="n",
            )
        answers = Answers(service, body, key, loaded, prepared, matcher, started, until_answered.pop_all().close)
    try:
        engine.submit(answers.sequences)
    except QueueFullError as error:
        answers.reject()
        raise queue_full(engine.seconds_to_wait()) from error
    return answers


async def lease(service: Service, request: Request, model: str) -> Loaded:
    """The model that is asked for, once it is in memory.

    Raises:
        ApiError: if there is none, no room for it in time, its files are broken, or the store does not give them.
    """
    service.arriving.add(request)
    try:
        async with asyncio.timeout(service.deadline):
            return await service.registry.lease(model)
    except UnknownModelError as error:
        raise unknown_model(model) from error
    except TimeoutError as error:
        raise ApiError(503, "this model did not come into memory in time", code="no_room") from error
    except NoRoomError as error:
        raise ApiError(503, str(error), code="no_room") from error
    except FetchError as error:
        log.error("delta not fetched", extra={"fields": {"tenant": model, "reason": str(error)}})
        raise ApiError(503, f"{model} cannot be fetched from the store; see the server's log", code="store") from error
    except DeltacomeError as error:
        log.error("delta broken", extra={"fields": {"tenant": model, "reason": str(error)}})
        raise ApiError(500, f"the files of {model} are broken; see the server's log") from error
    finally:
        service.arriving.discard(request)


async def _compile(service: Service, loaded: Loaded, grammar: str) -> Matcher:
    """A grammar over the model's vocabulary.

    Raises:
        ApiError: if it does not come in time.
        GrammarError: if there is none.
    """
    compiled = asyncio.get_running_loop().run_in_executor(service.compiler, loaded.language.grammars.matcher, grammar)
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            return await compiled
    except TimeoutError as error:
        message = f"the schema was not compiled in {COMPILE_SECONDS:g} s; try again, or make it simpler"
        raise ApiError(503, message, code="overloaded") from error


def _check(prompts: list[list[int]], max_tokens: int | None, max_length: int, vocabulary: int) -> None:
    """Refuse prompts that are empty or too long, or hold tokens that the model has not."""
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(prompt) + (max_tokens or 1) > max_length:
            raise ApiError(
                400,
                f"this model has room for {max_length} tokens; the prompt takes {len(prompt)} and the answer may take "
                f"{max_tokens or 1}: shorten the prompt, or ask for fewer tokens",
                code="context_length_exceeded",
            )
        if max(prompt) >= vocabulary:
            raise ApiError(400, f"the prompt holds token {max(prompt)}; this model has {vocabulary}", param="prompt")


async def _respond(service: Service, request: Request, body: GenerationRequest, chunks: Chunks) -> Response:
    """The answers as the client wants them, and in any case a line in the log."""
    service.background.add(task := asyncio.create_task(_log(chunks.answers, chunks.id, request)))
    task.add_done_callback(service.background.discard)
    if body.stream:
        wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return StreamingResponse(_stream(chunks, wants_usage), media_type="text/event-stream")
    whole = await _unless_gone(request, chunks.whole())
    return Response(status_code=499) if whole is None else JSONResponse(whole.model_dump(exclude_none=False))


async def _stream(chunks: Chunks, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a failure midway is one too."""
    try:
        async for chunk in chunks.stream():
            yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
        if wants_usage:
            yield f"data: {chunks.usage().model_dump_json(exclude_none=True)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, BaseModel]) -> BaseModel | None:
    """What the work gives; None, the work being cancelled, if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _log(answers: Answers, identifier: str, request: Request) -> None:
    """A line for each request that ended, and a span, without a word of what was said."""
    await answers.ended.wait()
    first = None if answers.first is None else round(answers.first - answers.started, 3)
    seconds = time.monotonic() - answers.started
    fields = {
        "id": identifier,
        "tenant": answers.name,
        "status": answers.status,
        "answers": len(answers.sequences),
        "prompt_tokens": answers.prompt_tokens,
        "tokens": answers.generated,
        "first_token_seconds": first,
        "seconds": round(seconds, 3),
    }
    log.info("request", extra={"fields": fields})
    attributes = {
        "gen_ai.request.model": answers.name,
        "gen_ai.response.id": identifier,
        "gen_ai.usage.input_tokens": answers.prompt_tokens,
        "gen_ai.usage.output_tokens": answers.generated,
        "deltacome.tenant": answers.name,
        "deltacome.status": answers.status,
        "deltacome.answers": len(answers.sequences),
        "deltacome.first_token_seconds": first,
    }
    answers.service.traces.add(request.url.path, seconds, attributes, request.headers)
