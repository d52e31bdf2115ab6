"""OpenAI's API over an engine and its tenants, as an ASGI application."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deltacome.errors import DeltacomeError
from deltacome.serve.engine.sampling import Sampling
from deltacome.serve.engine.scheduler import Engine, QueueFullError
from deltacome.serve.http import chunks
from deltacome.serve.http.answers import Answers
from deltacome.serve.http.guards import BodyGuard
from deltacome.serve.http.keys import Allowed, Keys
from deltacome.serve.http.protocol import (
    ApiError,
    Asked,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    LoadRequest,
    Model,
    Models,
    UnloadRequest,
)
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Loaded, NoRoomError, Registry, UnknownModelError
from deltacome.version import __version__

ERROR_SCHEMA = "#/components/schemas/ErrorBody"
WATCH_SECONDS = 2.0  # between two looks at the watched folder
log = logging.getLogger("deltacome.serve")
Format = Callable[[Answers], chunks.Chunks]


def create_app(
    engine: Engine, registry: Registry, metrics: Metrics, keys: Keys, *, max_length: int, deadline: float
) -> FastAPI:
    """The application; it starts the engine and stops it.

    max_length: tokens of a prompt and its answer. deadline: seconds that a request may take, waiting included.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        watcher = asyncio.create_task(_watch(registry))
        yield
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        await asyncio.to_thread(engine.stop)

    refused = {status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)}
    app = FastAPI(
        title="deltacome",
        version=__version__,
        description="Many fine-tunes of one base model, served from one batch.",
        lifespan=lifespan,
        docs_url=None,  # their scripts would come from somebody else's server
        redoc_url=None,
        responses=refused,  # type: ignore[arg-type]
    )
    app.add_middleware(BodyGuard)
    _describe_errors(app)
    bearer = HTTPBearer(auto_error=False)

    async def allowed(credentials: Annotated[Any, Depends(bearer)]) -> Allowed:
        found = keys.allowed(None if credentials is None else credentials.credentials)
        if found is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "no valid API key was given", code="invalid_api_key", headers=headers)
        return found

    async def master(found: Annotated[Allowed, Depends(allowed)]) -> None:
        if not found.is_everything:
            raise ApiError(403, "this needs the server's own API key")

    Key = Annotated[Allowed, Depends(allowed)]  # noqa: N806

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Health:
        if not engine.is_alive:
            raise ApiError(503, "the engine is not running")
        return Health()

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(master)])
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(key: Key) -> Models:
        return Models(data=[_model(registry, name, max_length) for name in _names(registry) if name in key])

    @app.get("/v1/models/{model:path}")
    async def model(model: str, key: Key) -> Model:
        if model not in _names(registry) or model not in key:
            raise _no_model(model)
        return _model(registry, model, max_length)

    @app.post("/v1/load_lora_adapter", dependencies=[Depends(master)], response_class=PlainTextResponse)
    async def load_delta(asked: LoadRequest) -> str:
        try:
            await registry.load(asked.lora_name, registry.resolve(asked.lora_path), replace=asked.load_inplace)
        except DeltacomeError as error:
            raise ApiError(400, str(error), param="lora_path") from error
        log.info("delta added", extra={"fields": {"tenant": asked.lora_name}})
        return f"Success: {asked.lora_name} is loaded."

    @app.post("/v1/unload_lora_adapter", dependencies=[Depends(master)], response_class=PlainTextResponse)
    async def unload_delta(asked: UnloadRequest) -> str:
        try:
            registry.remove(asked.lora_name)
        except UnknownModelError as error:
            raise ApiError(404, str(error), code="model_not_found", param="lora_name") from error
        log.info("delta removed", extra={"fields": {"tenant": asked.lora_name}})
        return f"Success: {asked.lora_name} is unloaded."

    async def answer(
        request: Request,
        asked: Asked,
        key: Allowed,
        encode: Callable[[Loaded], list[list[int]]],
        max_tokens: int | None,
        top: int | None,
        form: Format,
    ) -> Response:
        started = time.monotonic()
        if asked.model not in key:
            raise _no_model(asked.model)
        if len(arriving) + len(engine.waiting) >= engine.limits.waiting:
            raise _queue_full(engine)
        arriving.add(request)
        try:
            async with asyncio.timeout(deadline):
                loaded = await registry.lease(asked.model)
        except UnknownModelError as error:
            raise _no_model(asked.model) from error
        except TimeoutError as error:
            raise ApiError(503, "no memory for this model came free in time", code="no_room") from error
        except NoRoomError as error:
            raise ApiError(503, str(error), code="no_room") from error
        except DeltacomeError as error:
            log.error("delta broken", extra={"fields": {"tenant": asked.model, "reason": str(error)}})
            raise ApiError(500, f"the files of {asked.model} are broken; see the server's log") from error
        finally:
            arriving.discard(request)
        try:
            prompts = await asyncio.to_thread(encode, loaded)
            _check(prompts, max_tokens, max_length, loaded.vocabulary)
            answers = Answers(
                engine, registry, metrics, asked.model, loaded, prompts,
                choices=asked.n or 1,
                max_tokens=[max_tokens or max_length - len(prompt) for prompt in prompts],
                sampling=Sampling(
                    1.0 if asked.temperature is None else asked.temperature,
                    1.0 if asked.top_p is None else asked.top_p,
                    asked.seed,
                    top,
                ),
                stop=asked.stops,
                ends=set() if asked.ignore_eos else loaded.language.ends,
                started=started,
                deadline=started + deadline,
            )  # fmt: skip
        except BaseException:
            await registry.release(loaded)
            raise
        try:
            engine.submit(answers.sequences)
        except QueueFullError as error:
            answers.reject()
            raise _queue_full(engine) from error
        made = form(answers)
        background.add(task := asyncio.create_task(_log(answers, made.id)))
        task.add_done_callback(background.discard)
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_stream(made, wants_usage), media_type="text/event-stream")
        whole = await _unless_gone(request, made.whole())
        return Response(status_code=499) if whole is None else JSONResponse(whole.model_dump(exclude_none=False))

    arriving: set[Request] = set()  # those that wait for their delta
    background: set[asyncio.Task[None]] = set()
    streamed: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/completions", response_model=Completion, responses=streamed)
    async def completions(request: Request, asked: CompletionRequest, key: Key) -> Response:
        def encode(loaded: Loaded) -> list[list[int]]:
            return _completion_prompts(asked.prompt, loaded)

        top = asked.logprobs
        return await answer(request, asked, key, encode, asked.max_tokens or 16, top, chunks.CompletionChunks)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=streamed)
    async def chat(request: Request, asked: ChatRequest, key: Key) -> Response:
        def encode(loaded: Loaded) -> list[list[int]]:
            try:
                return [loaded.language.encoder.prompt(tuple(message.plain for message in asked.messages))]
            except DeltacomeError as error:
                raise ApiError(400, str(error), param="messages") from error

        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens or asked.max_tokens
        return await answer(request, asked, key, encode, most, top, chunks.ChatChunks)

    return app


def _names(registry: Registry) -> list[str]:
    return [registry.name, *sorted(registry.entries)]


def _no_model(name: str) -> ApiError:
    # The same for one that there is not and one that the key does not open.
    return ApiError(404, f"the model {name!r} does not exist or is not yours", code="model_not_found", param="model")


def _queue_full(engine: Engine) -> ApiError:
    seconds = engine.seconds_to_wait()
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, f"the queue is full; try again in {seconds} s", code="queue_full", headers=headers)


def _model(registry: Registry, name: str, max_length: int) -> Model:
    full = registry.base_checkpoint.elements * 2
    if name == registry.name:
        return Model(
            id=name, created=registry.created, parent=None, max_model_len=max_length, bytes=full, full_bytes=full,
            loaded=True,
        )  # fmt: skip
    entry = registry.entries[name]
    return Model(
        id=name, created=entry.created, parent=registry.name, max_model_len=max_length, bytes=entry.size,
        full_bytes=entry.full_bytes, loaded=entry.loaded is not None,
    )  # fmt: skip


def _completion_prompts(prompt: Any, loaded: Loaded) -> list[list[int]]:
    """Token ids of a text, of several, of tokens, or of several lists of tokens."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif isinstance(prompt[0], int):
        return [prompt]
    return [loaded.language.tokenizer(one).input_ids if isinstance(one, str) else one for one in prompt]


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


async def _stream(made: chunks.Chunks, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a failure midway is one too."""
    try:
        async for chunk in made.stream():
            yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
        if wants_usage:
            yield f"data: {made.usage().model_dump_json(exclude_none=True)}\n\n"
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


async def _log(answers: Answers, identifier: str) -> None:
    """A line for each request that ended, without a word of what was said."""
    await answers.ended.wait()
    now = time.monotonic()
    fields = {
        "id": identifier,
        "tenant": answers.name,
        "status": answers.status,
        "answers": len(answers.sequences),
        "prompt_tokens": answers.prompt_tokens,
        "tokens": answers.generated,
        "first_token_seconds": None if answers.first is None else round(answers.first - answers.started, 3),
        "seconds": round(now - answers.started, 3),
    }
    log.info("request", extra={"fields": fields})


async def _watch(registry: Registry) -> None:
    """Look at the watched folder again and again."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            registry.scan()
        except OSError as error:
            log.warning("delta folder unreadable", extra={"fields": {"reason": str(error)}})


def _describe_errors(app: FastAPI) -> None:
    """Every error in the API's form, and the OpenAPI document in keeping with it."""

    @app.exception_handler(ApiError)
    def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"][1:] if isinstance(part, str | int))
        wrong = ApiError(400, f"{place}: {found['msg']}" if place else str(found["msg"]), param=place or None)
        return api_error(request, wrong)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return api_error(request, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed", extra={"fields": {"error": type(error).__name__, "path": request.url.path}})
        return api_error(request, ApiError(500, "the server failed at this request; its log says how"))

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if status != "200":  # also of operations that answer in plain text
                        response["content"] = {"application/json": {"schema": {"$ref": ERROR_SCHEMA}}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
