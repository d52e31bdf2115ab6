"""OpenAI's API over an engine and its tenants, as an ASGI application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from deltacome.serve.http import completions, routes, tokens
from deltacome.serve.http.errors import RESPONSES, ApiWithErrors, handle_errors
from deltacome.serve.http.guards import BodyGuard, most_bytes
from deltacome.serve.http.service import Service
from deltacome.version import __version__

METHODS = ["GET", "POST"]
WATCH_SECONDS = 2.0  # between two looks at the watched folder
STORE_SECONDS = 10.0  # between two looks at the store
log = logging.getLogger("deltacome.serve")


def create_app(service: Service, origins: Sequence[str] = ()) -> FastAPI:
    """The application; it starts the service's engine and stops it.

    origins: of pages elsewhere, or `*` for all, whose scripts browsers let read the answers.
    """
    app = ApiWithErrors(
        title="deltacome",
        version=__version__,
        description="Many fine-tunes of one base model, served from one batch.",
        lifespan=_lifespan,
        docs_url=None,  # their scripts would come from somebody else's server
        redoc_url=None,
        responses=RESPONSES,
    )
    app.state.service = service
    app.add_middleware(BodyGuard, keys=service.keys, most_bytes=most_bytes(service.max_length))
    if origins:  # around the guard, so that its errors can be read too
        expose = ["Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=expose
        )
    handle_errors(app)
    app.include_router(routes.router)
    app.include_router(completions.router)
    app.include_router(tokens.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.engine.start()
    registry = service.registry
    watchers = [asyncio.create_task(_watch(registry.rescan, WATCH_SECONDS, "delta folder unreadable"))]
    if registry.fetching is not None:
        watchers.append(asyncio.create_task(_watch(registry.look_into_store, STORE_SECONDS, "store unreadable")))
    yield
    for watcher in watchers:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
    await asyncio.to_thread(service.engine.stop)
    await asyncio.to_thread(service.traces.stop)


async def _watch(look: Callable[[], Coroutine[Any, Any, None]], seconds: float, event: str) -> None:
    """Look at where deltas come from again and again, whatever comes; what goes wrong is said once, as that event."""
    said = ""
    while True:
        await asyncio.sleep(seconds)
        reason = ""
        try:
            await look()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason and reason != said:
            log.warning(event, extra={"fields": {"reason": reason}})
        said = reason
