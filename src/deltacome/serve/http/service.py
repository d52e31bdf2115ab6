"""What every request needs: the engine, the deltas, who may ask, and what requests may take."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deltacome.serve.engine.scheduler import Engine
from deltacome.serve.http.errors import ApiError
from deltacome.serve.http.keys import Allowed, Keys, no_valid_key
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Registry
from deltacome.serve.traces import Traces


@dataclass
class Service:
    """What an application answers with, in its `state`.

    max_length: tokens of a prompt and its answer. deadline: seconds that a request may take, waiting included.
    arriving: requests that wait for their delta. background: tasks that nothing else refers to. compiler:
    the thread on which grammars are compiled, one at a time. is_draining: whether it takes no more requests.
    """

    engine: Engine
    registry: Registry
    metrics: Metrics
    keys: Keys
    max_length: int
    deadline: float
    traces: Traces = field(default_factory=Traces)
    is_draining: bool = False
    arriving: set[Request] = field(default_factory=set)
    background: set[asyncio.Task[None]] = field(default_factory=set)
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "compiler"))


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


FromService = Annotated[Service, Depends(_service)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def _allowed(service: FromService, credentials: Credentials) -> Allowed:
    found = service.keys.allowed(None if credentials is None else credentials.credentials)
    if found is None:
        raise no_valid_key()
    return found


Key = Annotated[Allowed, Depends(_allowed)]


async def _check_master(key: Key) -> None:
    if not key.is_everything:
        raise ApiError(403, "this needs the server's own API key")


MASTER = Depends(_check_master)  # of operations for whoever runs the server
