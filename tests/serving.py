"""Servers for tests: real ones on free ports, on a thread of the test's, and what asks them."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

import deltacome
from conftest import Save, fine_tune, make_model, make_tokenizer
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder
from deltacome.restore.merging import load_merged, open_checked
from deltacome.serve.engine.scheduler import Engine
from deltacome.serve.http.connections import configure
from deltacome.serve.server import build

OTHER_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
CHAT: list[Any] = [{"role": "user", "content": "Hello there"}]


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of a server of the application, which is stopped at the end."""
    server = uvicorn.Server(configure(app, "127.0.0.1", 0, 60))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def folder(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two deltas of it in a folder of deltas; `b` has a chat template of its own."""
    folder = tmp_path_factory.mktemp("serve")
    base = save(make_model(initializer_range=0.2), "base")
    shutil.copytree(base, folder / "base")
    (folder / "deltas").mkdir()
    for seed, name in ((1, "a"), (2, "b")):
        model = make_model(initializer_range=0.2)
        fine_tune(model, seed, size=0.4)
        tuned = save(model, name)
        if name == "b":
            tokenizer = make_tokenizer()
            tokenizer.chat_template = OTHER_TEMPLATE
            tokenizer.save_pretrained(tuned)
        deltacome.compress(folder / "base", tuned, folder / "deltas" / name, ratio=8)
    return folder


def make_app(place: Path, **options: Any) -> FastAPI:
    deltas = {name: place / "deltas" / name for name in ("a", "b")}
    return build(place / "base", **{"deltas": deltas, **options})


@pytest.fixture(scope="module")
def app(folder: Path) -> FastAPI:
    return make_app(folder)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        yield address


def client(address: str, key: str = "none", **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="module")
def api(address: str) -> OpenAI:
    return client(address)


@pytest.fixture(scope="session")
def merged(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Model and tokenizer of each fine-tune, and the base's."""
    base = Checkpoint(folder / "base")
    model = deltacome.load(folder / "base")
    found = {name: load_merged(base, open_checked(base, folder / "deltas" / name)) for name in ("a", "b")}
    return {"base": (model, make_tokenizer()), **found}


def alone(merged: dict[str, tuple[Any, Any]], name: str, text: str, new_tokens: int) -> str:
    """The answer of a merged model to a user's message."""
    model, tokenizer = merged[name]
    prompt = Encoder(tokenizer).prompt(({"role": "user", "content": text},))
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=1, pad_token_id=1
    )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def raw(address: str, data: bytes) -> tuple[int, bytes]:
    """Send bytes as they are; status and body of the answer."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def post(address: str, body: bytes, path: str = "/v1/completions", headers: str = "") -> tuple[int, Any]:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}"
    status, answer = raw(address, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return status, json.loads(answer) if answer.startswith(b"{") else answer.decode()


def post_json(address: str, path: str, content: Any, key: str = "none") -> tuple[int, Any]:
    headers = f"Authorization: Bearer {key}\r\n"
    return post(address, json.dumps(content).encode(), path, headers)


def metric(address: str, name: str, key: str = "none") -> float:
    head = f"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\r\n"
    _, body = raw(address, head.encode())
    found = re.search(rf"^{re.escape(name)} (\S+)$", body.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the machine, a step takes 2 ms or more."""
    step = Engine.step

    def slow_step(self: Engine) -> None:
        time.sleep(0.002)
        step(self)

    monkeypatch.setattr(Engine, "step", slow_step)
