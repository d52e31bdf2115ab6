"""A server among others: ready or not, told to stop, asked by pages from elsewhere, traced, set up by a file."""

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from commands import run, start
from deltacome.errors import DeltacomeError
from deltacome.serve.engine.scheduler import Engine
from deltacome.serve.http import connections
from deltacome.serve.traces import ENDPOINTS, Traces
from serving import client, make_app, post_json, raw, serving, until

pytest_plugins = ["serving"]


def get(address: str, path: str, headers: str = "") -> tuple[int, Any]:
    status, body = raw(address, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
    return status, json.loads(body)


def free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_server_that_is_told_to_stop(folder: Path, tmp_path: Path) -> None:
    """What runs is finished, what comes is told to go elsewhere, and `/ready` says so; it is set up by a file."""
    port = free_port()
    config = tmp_path / "serve.toml"
    deltas = json.dumps([f"a={folder / 'deltas/a'}"])
    config.write_text(f"base = {json.dumps(str(folder / 'base'))}\ndelta = {deltas}\nport = 1\nmax-batch = 3\n")
    log = tmp_path / "log"
    server = start(log, "serve", "--config", config, "--port", port)
    try:
        until(lambda: log.exists() and "running on" in log.read_text(), 120)
        address = f"http://127.0.0.1:{port}"
        assert get(address, "/ready") == get(address, "/health") == (200, {"status": "ok"})
        ask: Any = {"model": "a", "prompt": "Once", "max_tokens": 480, "n": 16, "extra_body": {"ignore_eos": True}}
        stream = client(address).completions.create(**ask, stream=True)
        parts = [next(iter(stream))]
        os.kill(server.pid or 0, signal.SIGTERM)
        until(lambda: get(address, "/ready")[0] == 503, 3)
        assert get(address, "/ready")[1]["error"]["code"] == "shutting_down"
        assert get(address, "/health")[0] == 200
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client(address).completions.create(**ask)
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"] == "5"
        parts += list(stream)
        assert [part.choices[0].finish_reason for part in parts].count("length") == 16 and len(parts) == 16 * 480
        server.join(20)
        assert server.exitcode == 0
    finally:
        server.kill()


def test_a_server_waits_so_long_and_no_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests take longer than they may, or at a second signal."""
    step = Engine.step

    def slow_step(self: Engine) -> None:
        time.sleep(0.05)
        step(self)

    monkeypatch.setattr(Engine, "step", slow_step)
    for grace, signals in ((0.3, 1), (60.0, 2)):
        app, port = make_app(folder), free_port()
        server = connections.Server(connections.configure(app, "127.0.0.1", port, 1), app.state.service, grace)
        body = {"model": "a", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True}
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.run)
            until(lambda: server.started)  # noqa: B023
            asked = pool.submit(post_json, f"http://127.0.0.1:{port}", "/v1/completions", body)
            until(lambda: app.state.service.engine.running)  # noqa: B023
            begun = time.monotonic()
            for _ in range(signals):
                server.handle_exit(signal.SIGTERM, None)
                assert app.state.service.is_draining
            assert server.force_exit == (signals > 1)
            running.result(20)
            assert time.monotonic() - begun < 6
            with suppress(OSError, ValueError, IndexError):  # what came of it
                asked.result(20)


def test_pages_from_elsewhere(folder: Path) -> None:
    origin = "Origin: https://page.example\r\n"
    ask = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization, x-stainless-os\r\n"
    options = f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{origin}{ask}\r\n".encode()

    def headers(address: str, data: bytes) -> bytes:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(data)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer.partition(b"\r\n\r\n")[0].lower()

    wrong = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{origin}Content-Length: 1\r\n\r\nx".encode()
    )
    for origins, allowed in ((["https://page.example"], b"https://page.example"), (["*"], b"*")):
        with serving(make_app(folder, origins=origins)) as address:
            found = headers(address, options)
            assert b" 200 " in found and b"access-control-allow-origin: " + allowed in found
            assert b"x-stainless-os" in found
            found = headers(address, wrong)  # errors can be read as well
            assert b" 415 " in found and b"access-control-allow-origin: " + allowed in found
            other = options.replace(b"page.example", b"other.example")
            assert (b"access-control-allow-origin" in headers(address, other)) == (allowed == b"*")
    with serving(make_app(folder)) as address:
        assert b"access-control" not in headers(address, options)
    for origin in ("page.example", "https://page.example/", "https://"):
        with pytest.raises(DeltacomeError, match="is no origin of a page"):
            make_app(folder, origins=[origin])


def test_spans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert Traces()._provider is None
    exporter = InMemorySpanExporter()
    app = make_app(folder)
    app.state.service.traces = Traces(exporter)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(app) as address:
        begun = time.time_ns()
        api = client(address)
        answer = api.chat.completions.create(
            model="a", messages=[{"role": "user", "content": "Private words"}], max_tokens=5, n=2,
            extra_headers={"traceparent": parent}, temperature=0, extra_body={"ignore_eos": True},
        )  # fmt: skip
        parts = list(api.completions.create(model="base", prompt="x", max_tokens=3, stream=True))
        post_json(address, "/v1/completions", {"model": "c", "prompt": "x"})
        until(lambda: not app.state.service.background)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    chat, completion = spans.pop("/v1/chat/completions"), spans.pop("/v1/completions")
    assert not spans and answer.usage
    assert format(chat.context.trace_id, "032x") in parent and format(chat.parent.span_id, "016x") in parent
    assert completion.parent is None
    found = dict(chat.attributes)
    assert 0 < found.pop("deltacome.first_token_seconds") <= (chat.end_time - chat.start_time) / 1e9 + 0.001
    assert begun <= chat.start_time + 10**6 and chat.end_time <= time.time_ns()
    assert found == {
        "gen_ai.request.model": "a",
        "gen_ai.response.id": answer.id,
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 10,
        "deltacome.tenant": "a",
        "deltacome.status": "ok",
        "deltacome.answers": 2,
    }
    assert completion.attributes["gen_ai.usage.output_tokens"] == len(parts)
    assert "Private" not in chat.to_json()


def test_spans_without_opentelemetry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:1")
    result = run("serve", folder / "base")
    assert result.returncode == 1 and result.stderr == (
        f"error: {ENDPOINTS[0]} is set, and spans need OpenTelemetry: pip install 'deltacome[otel]', or unset it\n"
    )
