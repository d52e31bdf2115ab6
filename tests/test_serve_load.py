"""A server under load: queues, deadlines, clients that go, tenants that change all the time."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from deltacome.benchmark.load import Planned, drive
from deltacome.serve.engine.scheduler import Limits
from serving import client, make_app, metric, post_json, serving, until

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


def test_load_on_a_server_that_says_nothing_of_its_cache() -> None:
    """As vLLM's, whose usage has null in that place, or nothing."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        details = next(usages)
        for chunk in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "a"}}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1, **details}},
        ):
            writer.write(f"data: {json.dumps(chunk)}\n\n".encode())
        writer.close()

    async def run() -> list[Any]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await drive("127.0.0.1", port, [Planned(0.0, "a", ())] * 3, 1, True)

    told: list[dict[str, Any]] = [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {"cached_tokens": 2}}]
    usages = iter(told)
    answers = asyncio.run(run())
    assert all(each.failed is None and (each.text, each.prompt_tokens) == ("a", 3) for each in answers)
    assert sorted(each.cached_tokens for each in answers) == [0, 0, 2]
