"""The server, through the official client and through clients that mean no good."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import openai
import psutil
import pytest
import schemathesis
import torch
from fastapi import FastAPI
from openai import OpenAI
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

import deltacome
from conftest import Save, fine_tune, make_model, make_tokenizer
from deltacome import DeltacomeError
from deltacome.benchmark.load import plan
from deltacome.benchmark.serve import CACHE, DELTAS, DISK
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder
from deltacome.restore.merging import load_merged, open_checked
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.http.guards import BodyGuard
from deltacome.serve.http.keys import Keys
from deltacome.serve.server import build
from serving import serving

OTHER_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
CHAT: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


# The API.


def test_models(api: OpenAI) -> None:
    models = {model.id: model for model in api.models.list()}
    assert list(models) == ["base", "a", "b"]
    assert models["base"].parent is None and models["a"].parent == "base"
    assert 0 < models["a"].bytes < models["a"].full_bytes / 2 and models["a"].loaded
    assert api.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("c")


def test_mixed_requests_at_once_answer_as_each_model_alone(api: OpenAI, merged: dict[str, tuple[Any, Any]]) -> None:
    asked = [(("a", "base", "b")[i % 3], f"Question {i}: " + "why? " * (i % 7)) for i in range(32)]

    def ask(item: tuple[str, str]) -> str | None:
        messages: list[Any] = [{"role": "user", "content": item[1]}]
        answer = api.chat.completions.create(model=item[0], messages=messages, temperature=0, max_tokens=12)
        assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        return answer.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, asked))
    assert answers == [alone(merged, name, text, 12) for name, text in asked]
    assert len(set(answers)) > 20


def test_chat_goes_through_the_tenants_own_template(api: OpenAI) -> None:
    tokens = {}
    for name in ("a", "b"):
        answer = api.chat.completions.create(model=name, messages=CHAT, max_tokens=1)
        assert answer.usage
        tokens[name] = answer.usage.prompt_tokens
    assert tokens["b"] == len("[user] Hello there\n[assistant]")  # bytes are tokens
    assert tokens["a"] == len(make_tokenizer().apply_chat_template(CHAT, add_generation_prompt=True).input_ids)


def test_streams_say_what_whole_answers_say(api: OpenAI) -> None:
    options: Any = {"messages": CHAT, "temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 2}
    whole = api.chat.completions.create(model="a", **options).choices[0]
    chunks = list(
        api.chat.completions.create(model="a", stream=True, stream_options={"include_usage": True}, **options)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.message.content
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens > 0
    streamed = [token for chunk in chunks[1:-1] for token in chunk.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert whole.logprobs and streamed == whole.logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in streamed)  # greedy: the likeliest
    text = api.completions.create(model="a", prompt="Once", max_tokens=9, temperature=0).choices[0].text
    parts = api.completions.create(model="a", prompt="Once", max_tokens=9, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text


def test_completions_take_every_kind_of_prompt(api: OpenAI) -> None:
    def ask(prompt: Any, **options: Any) -> list[str]:
        answer = api.completions.create(model="b", prompt=prompt, max_tokens=6, temperature=0, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    texts = ["One", "Two and more"]
    tokens = [make_tokenizer()(text).input_ids for text in texts]
    each = [ask(text)[0] for text in texts]
    assert ask(texts) == ask(tokens) == each and ask(tokens[1]) == each[1:]
    assert ask(texts, n=2) == [each[0], each[0], each[1], each[1]]
    assert len(api.completions.create(model="b", prompt="x").choices[0].text) >= 0  # 16 tokens


def test_sampling_options(api: OpenAI) -> None:
    def ask(**options: Any) -> list[str]:
        answer = api.completions.create(model="a", prompt="Once", max_tokens=12, **options)
        return [choice.text for choice in answer.choices]

    greedy = ask(temperature=0)
    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    first, second = ask(seed=5, n=2)
    assert first == ask(seed=5)[0] and first != second
    assert ask(top_p=1e-6) == greedy != ask(seed=5)
    answer = api.completions.create(model="a", prompt="Once", max_tokens=12, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found and len(found.tokens) == 12 and len(found.top_logprobs[0]) == 3  # type: ignore[arg-type,index]
    stop = greedy[0][4:7]
    stopped = api.completions.create(model="a", prompt="Once", max_tokens=12, temperature=0, stop=[stop, "never"])
    assert stopped.choices[0].text == greedy[0][: greedy[0].index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert answer.choices[0].finish_reason == "length"


# Requests that are refused.


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"model": "a", "prompt"', 400, "JSON"),
        (b'{"model": "a", "prompt": "\xff\xfe"}', 400, ""),
        (b"[" * 100_000, 400, ""),
        (b"null", 400, ""),
        (b"", 400, ""),
        (b'{"model": "a", "prompt": "\\ud800"}', 400, "Unicode"),
        (b'{"model": "c", "prompt": "x"}', 404, "'c' does not exist"),
        (b'{"model": "../a", "prompt": "x"}', 404, "does not exist"),
        (b'{"model": "a"}', 400, "prompt"),
        (b'{"model": "a", "prompt": ""}', 400, "empty"),
        (b'{"model": "a", "prompt": []}', 400, "prompt"),
        (b'{"model": "a", "prompt": [[1], "x"]}', 400, "prompt"),
        (b'{"model": "a", "prompt": [259]}', 400, "token 259"),
        (b'{"model": "a", "prompt": [-1]}', 400, "prompt"),
        (b'{"model": "a", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "a", "prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"model": "a", "prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"model": "a", "prompt": "x", "max_tokens": 1e99}', 400, "max_tokens"),
        (b'{"model": "a", "prompt": "x", "max_tokens": 512}', 400, "room for 512 tokens"),
        (b'{"model": "a", "prompt": "x", "n": 1000}', 400, "n:"),
        (b'{"model": "a", "prompt": "x", "seed": 1e30}', 400, "seed"),
        (b'{"model": "a", "prompt": "x", "stop": ["1", "2", "3", "4", "5"]}', 400, "stop"),
        (b'{"model": "a", "prompt": "x", "stop": ""}', 400, "stop"),
        (b'{"model": "a", "prompt": "x", "best_of": 3}', 400, "best_of"),
        (b'{"model": "a", "prompt": "x", "frequency_penalty": 1}', 400, "frequency_penalty"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_requests(address: str, body: bytes, status: int, said: str) -> None:
    found, answer = post(address, body)
    assert found == status
    assert said in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_prompts_that_are_too_long(api: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt takes 600") as error:
        api.completions.create(model="a", prompt="x" * 600)
    assert error.value.code == "context_length_exceeded"
    answer = api.completions.create(model="a", prompt="x" * 504, max_tokens=8, temperature=0)
    assert answer.usage and answer.usage.total_tokens <= 512


def test_bodies_that_are_too_large_or_too_slow(address: str) -> None:
    status, answer = post(address, b" " * (9 * 2**20))
    assert status == 413 and "8,388,608" in answer["error"]["message"]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the application")

    app_with_guard: Any = BodyGuard(app, seconds=0.2)
    with serving(app_with_guard) as slow:
        status, body = raw(slow, head + b"{")
    assert status == 408 and b"did not arrive" in body


def test_unknown_paths_and_methods(address: str) -> None:
    assert post(address, b"{}", "/v1/nothing")[0] == 404
    assert post(address, b"{}", "/v1/models")[0] == 405
    assert raw(address, b"\x00\xff garbage\r\n\r\n")[0] == 400
    assert post(address, b'{"model": "a", "prompt": "x", "max_tokens": 1}')[0] == 200  # it serves on


def test_fuzzing_by_its_own_openapi_document(folder: Path) -> None:
    """Whatever the document allows and forbids, the server answers as the document says, and never with a 5xx."""
    with serving(make_app(folder, folder=folder / "deltas", keys=Keys("master", None))) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        headers, tried = {"Authorization": "Bearer master"}, 0
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in GenerationMode:

                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                @hypothesis.settings(max_examples=20, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
                @hypothesis.seed(0)
                def check(case: schemathesis.Case) -> None:
                    nonlocal tried
                    tried += 1
                    # Not everything that has the right form is there: folders, models, room for a prompt.
                    case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

                with suppress(hypothesis.errors.Unsatisfiable):  # what takes nothing can take nothing wrong
                    check()
        assert tried > 100
        assert client(address, "master").completions.create(model="a", prompt="x", max_tokens=1).choices


# Load, and clients that go.


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


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the machine, a step takes 2 ms or more."""
    step = Engine.step

    def slow_step(self: Engine) -> None:
        time.sleep(0.002)
        step(self)

    monkeypatch.setattr(Engine, "step", slow_step)


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


# Tenants that come and go.


def test_deltas_are_loaded_and_unloaded(folder: Path, merged: dict[str, tuple[Any, Any]]) -> None:
    with serving(make_app(folder, deltas={}, folder=folder / "deltas")) as address:
        api = client(address)

        def ask(name: str) -> str | None:
            answer = api.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=8)
            return answer.choices[0].message.content

        expected = {name: alone(merged, name, "Hello there", 8) for name in ("a", "b")}
        assert expected["a"] != expected["b"]
        assert ask("a") == expected["a"]  # found in the folder, loaded when asked for
        load: dict[str, Any] = {"lora_name": "new", "lora_path": "a"}
        assert post_json(address, "/v1/load_lora_adapter", load) == (200, "Success: new is loaded.")
        assert ask("new") == expected["a"]
        status, answer = post_json(address, "/v1/load_lora_adapter", {**load, "lora_path": "b"})
        assert status == 400 and "already" in answer["error"]["message"]
        running = api.chat.completions.create(model="new", messages=CHAT, temperature=0, max_tokens=8, stream=True)
        text = next(running).choices[0].delta.content or ""
        inside = {**load, "lora_path": str(folder / "deltas/b"), "load_inplace": True}
        assert post_json(address, "/v1/load_lora_adapter", inside)[0] == 200
        assert ask("new") == expected["b"]
        text += "".join(chunk.choices[0].delta.content or "" for chunk in running)
        assert text == expected["a"]  # what runs keeps what it began with
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
        with pytest.raises(openai.NotFoundError):
            ask("new")
        assert ask("b") == expected["b"]


def test_nothing_outside_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    deltas = tmp_path / "deltas"
    shutil.copytree(folder / "deltas", deltas)
    (deltas / "link").symlink_to(folder / "deltas" / "a")
    shutil.copytree(folder / "deltas" / "a", deltas / "broken")
    weights = next((deltas / "broken").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    paths = ["../base", "/", ".", "", "nothing", "link", "a\0b", "a" * 5000, str(folder / "deltas/a"), "broken"]
    names = ["../x", "x/y", "", "base", "a b", "é", "x" * 97]
    with serving(make_app(folder, deltas={}, folder=deltas)) as address:
        for name, path in [*(("x", path) for path in paths), *((name, "a") for name in names)]:
            status, answer = post_json(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            assert status == 400 and answer["error"]["message"], (name, path)
        assert {model.id for model in client(address).models.list()} == {"base", "a", "b", "broken"}
        status, answer = post_json(address, "/v1/completions", {"model": "broken", "prompt": "x"})
        assert status == 500 and "files of broken are broken" in answer["error"]["message"]


def test_a_delta_that_cannot_be_served_is_refused_at_once(
    folder: Path, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    tuned = make_model(initializer_range=0.2, rope_parameters=rope)
    fine_tune(tuned)
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    deltacome.compress(folder / "base", save(tuned, "turned"), deltas / "turned", ratio=8)
    with caplog.at_level("WARNING", "deltacome.serve"), serving(make_app(folder, deltas={}, folder=deltas)) as address:
        reasons = [getattr(record, "fields", {}).get("reason", "") for record in caplog.records]
        assert any("rope_theta is 500000.0" in reason for reason in reasons)
        assert [model.id for model in client(address).models.list()] == ["base"]
        status, answer = post_json(address, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "turned"})
        assert status == 400 and "rope_theta" in answer["error"]["message"]


def test_without_a_folder_nothing_can_be_loaded(address: str, folder: Path) -> None:
    content = {"lora_name": "x", "lora_path": str(folder / "deltas/a")}
    status, answer = post_json(address, "/v1/load_lora_adapter", content)
    assert status == 400 and "--delta-dir" in answer["error"]["message"]


def test_a_watched_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacome.serve.http.app.WATCH_SECONDS", 0.05)
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    with serving(make_app(folder, deltas={}, folder=deltas)) as address:
        api = client(address)

        def names() -> set[str]:
            return {model.id for model in api.models.list()}

        def ask() -> str:
            return api.completions.create(model="it", prompt="Once", temperature=0, max_tokens=8).choices[0].text

        assert names() == {"base"}
        (deltas / "broken").mkdir()
        (deltas / "broken" / "deltacome.json").write_text("{}")
        shutil.copytree(folder / "deltas/a", tmp_path / "it")
        (tmp_path / "it").rename(deltas / "it")
        until(lambda: names() == {"base", "it"})
        first = ask()
        shutil.copytree(folder / "deltas/b", tmp_path / "it")
        (deltas / "it").rename(tmp_path / "old")
        (tmp_path / "it").rename(deltas / "it")
        until(lambda: not api.models.retrieve("it").loaded)
        assert ask() != first
        shutil.rmtree(deltas / "it")
        until(lambda: names() == {"base"})


@pytest.mark.usefixtures("slow_steps")
def test_memory_limit(folder: Path) -> None:
    size = deltacome.load(folder / "base", {"a": folder / "deltas/a"}).deltas["a"].bytes
    with serving(make_app(folder, deltas={}, folder=folder / "deltas", memory_limit=int(1.5 * size))) as address:
        api = client(address)

        def ask(name: str) -> str:
            return api.completions.create(model=name, prompt="Once", temperature=0, max_tokens=8).choices[0].text

        def loaded() -> set[str]:
            return {model.id for model in api.models.list() if model.loaded} - {"base"}

        first = ask("a")
        assert loaded() == {"a"}
        other = ask("b")
        assert loaded() == {"b"} and other != first
        assert ask("a") == first
        more: dict[str, Any] = {"ignore_eos": True}
        running = api.completions.create(model="a", prompt="x", max_tokens=450, stream=True, extra_body=more)
        next(iter(running))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(ask, "b")  # until the running request lets go of "a"
            time.sleep(0.1)
            assert loaded() == {"a"} and not waiting.done()
            list(running)
            assert waiting.result() == other
        assert metric(address, 'deltacome_delta_evictions_total{tenant="a"}') == 2
        assert metric(address, 'deltacome_delta_bytes{tenant="a"}') == 0
    with serving(make_app(folder, deltas={}, folder=folder / "deltas", memory_limit=100)) as address:
        status, answer = post_json(address, "/v1/completions", {"model": "a", "prompt": "x"})
        assert status == 503 and "raise it" in answer["error"]["message"]


def test_keys(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"key-a": ["a"], "key-b": ["b", "base"]}))
    keys = Keys("master", file)
    with serving(make_app(folder, folder=folder / "deltas", keys=keys)) as address:
        for key, names in (("key-a", {"a"}), ("key-b", {"b", "base"}), ("master", {"base", "a", "b"})):
            api = client(address, key)
            assert {model.id for model in api.models.list()} == names
            for name in ("base", "a", "b"):
                if name in names:
                    api.completions.create(model=name, prompt="x", max_tokens=1)
                else:
                    with pytest.raises(openai.NotFoundError, match="does not exist or is not yours"):
                        api.completions.create(model=name, prompt="x", max_tokens=1)
                    with pytest.raises(openai.NotFoundError):
                        api.models.retrieve(name)
        for key in ("", "master2", "key-", "none"):
            with pytest.raises(openai.AuthenticationError):
                client(address, key or "x").models.list()
        load = {"lora_name": "new", "lora_path": "a"}
        assert post_json(address, "/v1/load_lora_adapter", load, "key-a")[0] == 403
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "b"}, "key-a")[0] == 403
        assert post_json(address, "/v1/load_lora_adapter", load, "nobody")[0] == 401
        assert post_json(address, "/v1/load_lora_adapter", load, "master")[0] == 200
        get = "GET {} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        assert raw(address, get.format("/metrics").encode())[0] == 401
        assert raw(address, get.format("/health").encode())[0] == 200
        assert metric(address, 'deltacome_requests_total{status="ok",tenant="a"}', "master") == 2
        assert metric(address, 'deltacome_time_to_first_token_seconds_count{tenant="base"}', "master") == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"k": "a"}', '{"": ["a"]}', '{"clé": ["a"]}', '{"k": [1]}'])
def test_bad_key_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(DeltacomeError, match="keys"):
        Keys(None, file)
    with pytest.raises(DeltacomeError, match="cannot read"):
        Keys(None, tmp_path / "none.json")


# The command.


def test_the_command_finishes_what_runs_when_told_to_stop(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder / "base"), "--delta", f"a={folder / 'deltas/a'}", "--port", str(port)]
    environment = {**os.environ, "DELTACOME_API_KEY": "secret"}
    command = [sys.executable, "-m", "deltacome.cli", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "running on" in line:
                break
        api = client(f"http://127.0.0.1:{port}", "secret")
        stream = api.completions.create(model="a", prompt="Private words", max_tokens=300, stream=True, seed=1)
        parts = [next(iter(stream))]
        busy = subprocess.run(command, env=environment, capture_output=True, text=True)
        server.send_signal(signal.SIGTERM)
        parts += list(stream)
        assert parts[-1].choices[0].finish_reason in ("length", "stop") and len(parts) > 50
        lines += list(server.stderr)
        assert server.wait(30) == 0
    assert busy.returncode == 1 and busy.stderr.splitlines()[-1].startswith(f"error: cannot serve on 127.0.0.1:{port}")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    request = next(line for line in found if line["event"] == "request")
    assert request["tenant"] == "a" and request["status"] == "ok" and request["tokens"] == len(parts)
    assert "Private" not in "".join(lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--delta", "a=nothing"], "nothing"),
        (["--delta-dir", "nothing"], "there is no folder nothing"),
        (["--memory-limit", "much"], "much is no size"),
        (["--api-keys", "nothing.json"], "cannot read the keys"),
        (["--max-length", "100000"], "room for 512"),
        (["--delta", "../x=nothing"], "no name for a model"),
    ],
)
def test_bad_commands(folder: Path, options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "deltacome.cli", "serve", str(folder / "base"), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and said in last
    assert "Traceback" not in result.stderr


# Everything at once.


@pytest.mark.parametrize("seconds", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_churn(folder: Path, tmp_path: Path, merged: dict[str, tuple[Any, Any]], seconds: float) -> None:
    """Load while tenants come and go: no wrong answer, no lost request, memory flat at the end."""
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


def test_benchmark(folder: Path, tmp_path: Path) -> None:
    """The same requests to both servers: the same answers, and a model loaded whenever another's turn comes."""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"Say {i}", "completion": str(i)}) for i in range(5)]
    data.write_text("\n".join(lines))
    deltas = [part for name in ("a", "b") for part in ("--delta", f"{name}={folder / 'deltas' / name}")]
    options = [
        "--data",
        str(data),
        "--rate",
        "20",
        "--requests",
        "8",
        "--max-new-tokens",
        "6",
        "--ignore-eos",
        "--json",
    ]
    command = ["benchmark", "serve", str(folder / "base"), *deltas, *options, "-o", str(tmp_path / "out"), "--json"]
    result = subprocess.run([sys.executable, "-m", "deltacome.cli", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {row["system"]: row for row in json.loads(result.stdout)}
    assert list(rows) == [DELTAS, DISK, CACHE]
    for row in rows.values():
        assert row["same"] == 8 and row["failed"] == 0
        assert row["tokens_per_second"] == pytest.approx(6 * row["requests_per_second"], rel=0.05)
        assert 0 < row["first_median"] <= row["first_p95"] <= row["first_p99"]
    assert rows[DELTAS]["swaps"] == 0 and rows[DISK]["swaps"] >= 2
    assert (tmp_path / "out/serve.png").stat().st_size > 10_000
    assert (tmp_path / "out/serve.md").read_text().count("\n| ") == 5


def test_the_plan_of_a_load() -> None:
    prompts: Any = {name: [({"role": "user", "content": f"{name}{i}"},) for i in range(3)] for name in "xyz"}
    planned = plan(prompts, 4000, 10.0, 1.0, 0)
    assert planned == plan(prompts, 4000, 10.0, 1.0, 0) != plan(prompts, 4000, 10.0, 1.0, 1)
    gaps = [after.seconds - before.seconds for before, after in pairwise(planned)]
    assert min(gaps) > 0 and sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.1)
    deviation = sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)
    assert deviation == pytest.approx(0.01, rel=0.2)  # exponential
    shares = [sum(request.model == name for request in planned) / 4000 for name in "xyz"]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.03)
    assert [request.messages[0]["content"] for request in planned if request.model == "x"][:4] == [
        "x0",
        "x1",
        "x2",
        "x0",
    ]
