"""Clients that mean a server no good, and whether it has come to harm."""

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from fastapi import FastAPI

from serving import metric, post_json, until


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read(connection: socket.socket) -> bytes:
    """What comes until the connection is closed, however."""
    answer = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            answer += part
    return answer


BODY = {"model": "a", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8, "temperature": 0}


def attack(address: str, clients: int, seed: int, expected: str) -> None:
    """Clients that do one of all that is not nice each, many at once; those that only send slowly are answered."""
    body = json.dumps(BODY).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    streamed = json.dumps({**BODY, "stream": True, "max_tokens": 400, "temperature": 1}).encode()

    answered: list[str] = []

    def be_bad(number: int) -> None:
        own = random.Random(seed * 10_000 + number)
        with suppress(OSError), connect(address) as connection:
            kind = number % 9
            if kind == 0:  # opens and vanishes
                return
            if kind == 1:  # vanishes in the middle
                connection.sendall(whole[: own.randrange(len(whole))])
            elif kind == 2:  # sends slowly, and is answered
                for start in range(0, len(whole), 40):
                    connection.sendall(whole[start : start + 40])
                    time.sleep(0.002)
                answer = read(connection)
                if not answer.startswith(b"HTTP/1.1 429"):
                    content = json.loads(answer.partition(b"\r\n\r\n")[2])
                    answered.append(content["choices"][0]["message"]["content"])
            elif kind == 3:  # garbage
                connection.sendall(own.randbytes(own.randrange(1, 5000)) + b"\r\n\r\n")
                read(connection)
            elif kind == 4:  # huge headers
                connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000)
                read(connection)
            elif kind == 5:  # deep JSON
                deep = b'{"model": "a", "messages": ' + b"[" * 50_000
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(deep) + deep)
                read(connection)
            elif kind == 6:  # a body with some bytes changed
                changed = bytearray(body)
                for _ in range(own.randrange(1, 6)):
                    changed[own.randrange(len(body))] = own.randrange(256)
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + changed)
                read(connection)
            elif kind == 7:  # vanishes while it is answered
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(streamed) + streamed)
                connection.recv(own.randrange(1, 2000))
            else:  # a whole request, and does not wait
                connection.sendall(whole)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(be_bad, range(clients)))
    assert answered and set(answered) == {expected}


def check_unharmed(app: FastAPI, address: str, expected: str) -> None:
    """It answers what it should, and keeps nothing of those who went."""
    service = app.state.service
    until(lambda: service.engine.is_idle)
    until(lambda: not any(loaded.uses for loaded in service.registry.in_memory) and not service.arriving)
    assert not service.background and metric(address, "deltacome_batch_rows") == 0
    status, answer = post_json(address, "/v1/chat/completions", BODY)
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected
