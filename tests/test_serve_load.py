"""A server under load: queues, deadlines, clients that go, tenants that change all the time."""

import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from deltacome.serve.engine.scheduler import Limits
from serving import alone, client, make_app, metric, post_json, serving, until

pytest_plugins = ["serving"]


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    with serving(make_app(folder, limits=Limits(rows=1, waiting=1))) as address:
        api = client(address)
        running = api.completions.create(model="a", prompt="x", max_tokens=500, stream=True)
        next(iter(running))
        statuses = []
        with ThreadPoolExecutor(4) as pool:

            def ask(_: int) -> Any:
                try:
                    return api.completions.create(model="b", prompt="x", max_tokens=2)
                except openai.RateLimitError as error:
                    assert int(error.response.headers["retry-after"]) >= 1 and error.code == "queue_full"
                    return None

            waiting = [pool.submit(ask, i) for i in range(4)]
            time.sleep(0.5)
            running.close()
            statuses = [future.result() for future in waiting]
    assert statuses.count(None) == 3


def test_more_answers_than_the_queue_has_room_for(folder: Path) -> None:
    with serving(make_app(folder, limits=Limits(rows=2, waiting=6))) as address:
        api = client(address)
        with pytest.raises(openai.BadRequestError, match="asks for 8 answers, and the server's queue has room for 6"):
            api.completions.create(model="a", prompt=["x"] * 4, n=2, max_tokens=2)
        assert len(api.completions.create(model="a", prompt=["x"] * 3, n=2, max_tokens=2).choices) == 6


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(address: str, stream: bool) -> None:
    body = json.dumps({"model": "a", "prompt": "x", "max_tokens": 500, "stream": stream, "seed": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    host, port = address.removeprefix("http://").split(":")
    before = metric(address, 'deltacome_tokens_total{tenant="a"}')
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: metric(address, "deltacome_batch_rows") == 1)
    until(lambda: metric(address, 'deltacome_requests_total{status="cancelled",tenant="a"}') >= 1 + (not stream))
    assert metric(address, "deltacome_batch_rows") == 0
    assert metric(address, 'deltacome_tokens_total{tenant="a"}') - before < 500


@pytest.mark.usefixtures("slow_steps")
def test_deadlines(folder: Path) -> None:
    with serving(make_app(folder, deadline=0.3)) as address:
        body = {"model": "a", "prompt": "x", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        status, answer = post_json(address, "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        more: dict[str, Any] = {"ignore_eos": True}
        parts = client(address).completions.create(
            model="a", prompt="x", max_tokens=400, temperature=0, stream=True, extra_body=more
        )
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(parts)
        assert post_json(address, "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_churn(
    folder: Path, tmp_path: Path, merged: dict[str, tuple[Any, Any]], length: str, request: pytest.FixtureRequest
) -> None:
    """Load while tenants come and go: no wrong answer, no lost request, memory flat at the end."""
    seconds = 8 if length == "short" else request.config.getoption("--churn")
    deltas = tmp_path / "deltas"
    shutil.copytree(folder / "deltas", deltas)
    texts = [f"Say {i}" for i in range(6)]
    expected = {(name, text): alone(merged, name, text, 10) for name in ("base", "a", "b") for text in texts}
    end = time.monotonic() + seconds
    process, memory, answered, changed = psutil.Process(), [], [0], [0]
    with serving(make_app(folder, deltas={}, folder=deltas)) as address:
        api = client(address)

        def ask(worker: int) -> None:
            turn = worker
            while time.monotonic() < end:
                turn += 1
                name, text = ("base", "a", "b")[turn % 3], texts[turn // 3 % 6]
                messages: list[Any] = [{"role": "user", "content": text}]
                answer = api.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=10)
                assert answer.choices[0].message.content == expected[name, text]
                answered[0] += 1

        def change() -> None:
            turn = 0
            while time.monotonic() < end:
                turn += 1
                source = "ab"[turn % 2]
                name = f"extra-{turn % 3}"
                content = {"lora_name": name, "lora_path": source, "load_inplace": True}
                assert post_json(address, "/v1/load_lora_adapter", content)[0] == 200
                answer = api.completions.create(model=name, prompt="x", temperature=0, max_tokens=3)
                assert answer.choices[0].finish_reason
                if turn % 2:
                    assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
                changed[0] += 1
                memory.append(process.memory_info().rss)

        with ThreadPoolExecutor(7) as pool:
            for work in [pool.submit(change), *(pool.submit(ask, worker) for worker in range(6))]:
                work.result()
        assert metric(address, "deltacome_batch_rows") == metric(address, "deltacome_queue_sequences") == 0
    assert answered[0] > seconds and changed[0] > seconds / 2
    third = len(memory) // 3
    grown = sum(memory[-third:]) / third - sum(memory[third : 2 * third]) / third
    assert grown < 20 * 2**20, f"memory grew by {grown / 2**20:.1f} MiB"
    print(f"{answered[0]} answers, {changed[0]} changes, memory grew by {grown / 2**20:.1f} MiB")
