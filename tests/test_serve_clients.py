"""Clients that are slow, vanish, or mean no good: what they do costs nobody else anything."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from clients import attack, check_unharmed, connect, read
from deltacome.serve.http import connections, guards
from deltacome.serve.http.guards import BodyGuard
from deltacome.serve.http.keys import Keys
from serving import alone, make_app, raw, serving, until

pytest_plugins = ["serving"]


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application without a route."""
    if scope["type"] == "http":
        raise AssertionError("reached the application")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        ([(b"authorization", b"Bearer wrong")], 401),
        ([(b"authorization", b"Basic master")], 401),
        ([(b"authorization", b"Bearer master"), (b"content-length", b"99999999")], 413),
    ],
)
def test_nothing_is_kept_of_a_body_that_headers_refuse(headers: list[Any], status: int) -> None:
    guard = BodyGuard(nothing, Keys("master", None))
    sent: list[Any] = []
    most, parts = 0, 200

    async def receive() -> Any:
        nonlocal most, parts
        most, parts = max(most, guard.buffered), parts - 1
        return {"type": "http.request", "body": b" " * 65536, "more_body": parts > 0}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), *headers]
    asyncio.run(guard({"type": "http", "method": "POST", "headers": headers}, receive, send))
    assert sent[0]["status"] == status and most == 0 == parts


def test_bodies_that_are_read_at_once_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MOST_BUFFERED", 2**20)
    reached = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(len((await receive())["body"]))

    guard = BodyGuard(app, Keys(None, None))
    statuses: list[int] = []

    async def ask() -> None:
        parts = 5

        async def receive() -> Any:
            nonlocal parts
            parts -= 1
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b" " * 65536, "more_body": parts > 0}

        async def send(message: Any) -> None:
            if "status" in message:
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        await guard({"type": "http", "method": "POST", "headers": headers}, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(*(ask() for _ in range(5)))

    asyncio.run(all_at_once())
    assert reached and set(reached) == {5 * 65536} and set(statuses) == {503} and guard.buffered == 0


def test_headers_that_never_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    def ask(connection: socket.socket) -> None:
        connection.sendall(get)
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            part = connection.recv(65536)
            assert part
            answer += part

    for before, data in ((0, b""), (0, b"GET /hea"), (1, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX")):
        with connect(address) as connection:
            for _ in range(before):
                ask(connection)
            connection.sendall(data)
            answer = read(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"headers did not arrive in 0.2 s" in answer
    with connect(address) as connection:  # between requests it may be silent
        for _ in range(2):
            ask(connection)
            time.sleep(0.4)


def test_more_connections_than_there_may_be(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 5)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(address))
        answer = b""

        def is_refused() -> bool:
            nonlocal answer
            with connect(address) as connection:
                answer = read(connection)
            return b"503" in answer

        until(is_refused)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
    until(lambda: raw(address, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200)


def test_an_answer_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    ended: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        begun = time.monotonic()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        ended.append(time.monotonic() - begun)

    any_app: Any = app
    with serving(any_app) as address, connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: ended, 5)


def test_clients_that_mean_no_good(folder: Path, merged: dict[str, tuple[Any, Any]]) -> None:
    app = make_app(folder)
    with serving(app) as address:
        expected = alone(merged, "a", "Who?", 8)
        attack(address, 90, 0, expected)
        check_unharmed(app, address, expected)
