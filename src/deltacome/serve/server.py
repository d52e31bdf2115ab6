"""From a base and some deltas to a running server."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.runtime.model import load
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.http.app import create_app
from deltacome.serve.http.keys import Keys
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Registry

PROMPT_TOKENS_ON_GPU = 2048  # at a step; a processor reads 128 in about the time of one
GRACE_SECONDS = 60  # that running requests have when the server is told to stop


def build(
    base: str | Path,
    deltas: Mapping[str, str | Path],
    *,
    name: str | None = None,
    folder: Path | None = None,
    memory_limit: int | None = None,
    keys: Keys | None = None,
    limits: Limits | None = None,
    max_length: int | None = None,
    deadline: float = 600.0,
    chat_template: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> FastAPI:
    """The server's application, as `deltacome serve` has it; see its options. `folder`'s deltas are loaded on demand.

    Raises:
        DeltacomeError: if the base cannot be loaded, or a delta is broken in a way that shows at once.
    """
    return on_a_thread(
        lambda: _build(
            base, deltas, name, folder, memory_limit, keys, limits, max_length, deadline, chat_template, device, dtype
        )
    )


def on_a_thread(make: Callable[[], FastAPI]) -> FastAPI:
    """What `make` returns, made on a thread that ends: the engine's must be the only one with OpenMP threads.

    See `compute_alone`.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def _build(
    base: str | Path,
    deltas: Mapping[str, str | Path],
    name: str | None,
    folder: Path | None,
    memory_limit: int | None,
    keys: Keys | None,
    limits: Limits | None,
    max_length: int | None,
    deadline: float,
    chat_template: str | None,
    device: str | None,
    dtype: torch.dtype | None,
) -> FastAPI:
    checkpoint = Checkpoint(base)
    model = load(base, device=device, dtype=dtype)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        max_length = longest or 4096
    if longest is not None and max_length > longest:
        raise DeltacomeError(f"{base} has room for {longest} tokens, fewer than --max-length {max_length}")
    limits = limits or Limits()
    if model.device.type != "cpu":
        limits = replace(limits, prompt=PROMPT_TOKENS_ON_GPU)
    metrics = Metrics()

    def on_step(engine: Engine) -> None:
        metrics.queue.set(len(engine.waiting))
        metrics.rows.set(len(engine.running))
        metrics.tenants.set(len({sequence.tenant for sequence in engine.running}))
        metrics.cache.set(engine.length * len(engine.running))
        if engine.running:
            metrics.steps.observe(len(engine.running))

    registry = Registry(
        model,
        checkpoint,
        name or checkpoint.name,
        metrics,
        folder=folder,
        memory_limit=memory_limit,
        chat_template=chat_template,
    )
    for delta, place in deltas.items():
        registry.add(delta, Path(place))
        registry.preload(delta)
    registry.scan()
    engine = Engine(model, limits, on_step)
    return create_app(engine, registry, metrics, keys or Keys(None, None), max_length=max_length, deadline=deadline)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then is finished, for as long as `GRACE_SECONDS`.

    Raises:
        DeltacomeError: if the address is taken.
    """
    log_as_json()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except KeyboardInterrupt:
        pass  # uvicorn has stopped by then, and gives the signal on
    except SystemExit as error:
        raise DeltacomeError(f"cannot serve on {host}:{port}; is something else there?") from error


class _Json(logging.Formatter):
    """A JSON object a line: time, level, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.levelno >= logging.ERROR:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def log_as_json() -> None:
    """Log to standard error, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name in ("deltacome.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
