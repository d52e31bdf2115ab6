"""From a base and some deltas to a running server."""

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from fastapi import FastAPI

from deltacome.errors import DeltacomeError
from deltacome.runtime.model import load
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.http.app import create_app
from deltacome.serve.http.connections import Server, configure
from deltacome.serve.http.keys import Keys
from deltacome.serve.http.service import Service
from deltacome.serve.logs import log_as_json
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Registry
from deltacome.serve.traces import Traces
from deltacome.store.cache import Cache, cache_folder
from deltacome.store.fetching import Fetching
from deltacome.store.store import Store

PROMPT_TOKENS_ON_GPU = 2048  # at a step
GRACE_SECONDS = 60  # that running requests have when the server is told to stop
CLOSE_SECONDS = 5  # that their last bytes have then
log = logging.getLogger("deltacome.serve")
Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")


def on_a_thread(make: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """Call a function on a thread that ends: the engine's must be the only one with OpenMP threads.

    See `compute_alone`.
    """

    @wraps(make)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Made:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(make, *arguments, **options).result()

    return call


@on_a_thread
def build(
    base: str | Path,
    deltas: Mapping[str, str | Path],
    *,
    name: str | None = None,
    folder: Path | None = None,
    store: str | None = None,
    store_cache: int | None = None,
    pinned: Sequence[str] = (),
    memory_limit: int | None = None,
    keys: Keys | None = None,
    limits: Limits | None = None,
    max_length: int | None = None,
    deadline: float = 600.0,
    chat_template: str | None = None,
    tool_format: str | None = None,
    origins: Sequence[str] = (),
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> FastAPI:
    """The server's application, as `deltacome serve` has it; see its options.

    Deltas of `folder` and `store` are loaded on demand.

    Raises:
        DeltacomeError: if an origin is none, the base cannot be loaded, the store does not answer, a pinned delta
            cannot be served, or deltas were given and none of them can be served; where only some cannot, the log says
            which and why.
    """
    for origin in origins:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise DeltacomeError(f"{origin} is no origin of a page; write it like https://example.org, or * for all")
    traces = Traces()
    model, metrics = load(base, device=device, dtype=dtype), Metrics()
    checkpoint = model.tenants.checkpoint  # its fingerprint is taken once
    max_length = _max_length(base, model, max_length)
    limits = limits or Limits()
    if model.device.type != "cpu":
        limits = replace(limits, prompt=PROMPT_TOKENS_ON_GPU)
    fetching = None
    if store is not None:
        fetching = Fetching(Store(store), Cache(cache_folder(), store_cache), checkpoint.fingerprint())
    registry = Registry(
        model,
        checkpoint,
        name or checkpoint.name,
        metrics,
        folder=folder,
        memory_limit=memory_limit,
        chat_template=chat_template,
        fetching=fetching,
        tool_format=tool_format,
    )
    refused: DeltacomeError | None = None
    for delta_name, delta_folder in deltas.items():
        try:
            registry.add(delta_name, Path(delta_folder))
            registry.preload(delta_name)
        except DeltacomeError as error:
            refused = error
            log.error("delta refused", extra={"fields": {"tenant": delta_name, "reason": str(error)}})
    registry.scan()
    if registry.fetching is not None:
        asyncio.run(registry.look_into_store())
    asyncio.run(registry.pin(pinned))
    if refused is not None and not registry.deltas:
        raise refused
    engine = Engine(model, limits, partial(_record_step, metrics))
    service = Service(engine, registry, metrics, keys or Keys(None, None), max_length, deadline, traces)
    return create_app(service, origins)


def _max_length(base: str | Path, model: Any, asked: int | None) -> int:
    """Tokens of a prompt and its answer: what is asked for, or what the base has room for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and longest is not None and asked > longest:
        raise DeltacomeError(f"{base} has room for {longest} tokens, fewer than --max-length {asked}")
    return asked or longest or 4096


def _record_step(metrics: Metrics, engine: Engine) -> None:
    metrics.queue.set(len(engine.waiting))
    rows = engine.running
    metrics.rows.set(len(rows))
    metrics.tenants.set(len({sequence.tenant for sequence in rows}))
    metrics.cache.set(sum(own.length * len(own.sequences) for own in engine.batches))
    metrics.prefixes.set(engine.prefixes.tokens)
    if rows:
        metrics.steps.observe(len(rows))


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then is finished, for as long as `GRACE_SECONDS`.

    Raises:
        DeltacomeError: if the address is taken.
    """
    log_as_json()
    server = Server(configure(app, host, port, CLOSE_SECONDS), app.state.service, GRACE_SECONDS)
    try:
        server.run()
    except KeyboardInterrupt:
        pass  # uvicorn has stopped by then, and gives the signal on
    except SystemExit as error:
        raise DeltacomeError(f"cannot serve on {host}:{port}; is something else there?") from error
