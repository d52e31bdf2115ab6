"""Limits on connections, for clients that send nothing, send slowly, or do not read what they asked for."""

import asyncio
import json
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltacome.serve.http.errors import ApiError
from deltacome.serve.http.service import Service

MOST_CONNECTIONS = 512
HEADER_SECONDS = 10.0  # that a client may take from the first byte, or from connecting, to the end of its headers
READ_SECONDS = 60.0  # that a client may leave an answer unread
KEEP_ALIVE_SECONDS = 30


class Connection(H11Protocol):
    """A client's connection, which ends when its limits do."""

    _timer: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(ApiError(503, "the server has too many connections; try again", code="overloaded"))
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        """Set the clock while no request is being answered, and stop it when one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, f"the request's headers did not arrive in {HEADER_SECONDS:g} s"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_clock()  # uvicorn's own runs between requests

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "what was sent is not HTTP, or its headers are larger than 64 KiB"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        head = f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Ends when it is told to, after what runs: requests that come meanwhile are told so instead of being cut off.

    grace: seconds that what runs has. At a second signal it ends at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace
        self._told: tuple[int, float] | None = None  # by which signal, and until when it may go on

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told is None:
            self._told = sig, time.monotonic() + self.grace
            self.service.is_draining = True
        else:
            self.force_exit = True
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._told is not None and not self.should_exit:
            signal, end = self._told
            if not self.server_state.tasks or time.monotonic() > end:
                super().handle_exit(signal, None)
        return await super().on_tick(counter)


def configure(app: Any, host: str, port: int, grace: int) -> uvicorn.Config:
    """How the server listens. grace: seconds that connections have when it stops."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
