"""The server's API, through the official client and through clients that mean no good."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import openai
import pytest
import schemathesis
from openai import OpenAI
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from conftest import make_tokenizer
from deltacome.serve.http.guards import BodyGuard
from deltacome.serve.http.keys import Keys
from serving import CHAT, alone, client, make_app, post, raw, serving

pytest_plugins = ["serving"]


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
    answer = api.completions.create(model="b", prompt="x", extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


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
        (b'{"model": "a", "prompt": "x", "n": 1000}', 400, "n must be a whole number from 1 to 16"),
        (b'{"model": "a", "prompt": "x", "seed": 1e30}', 400, "seed"),
        (b'{"model": "a", "prompt": "x", "stop": ["1", "2", "3", "4", "5"]}', 400, "stop"),
        (b'{"model": "a", "prompt": "x", "stop": ""}', 400, "stop"),
        (b'{"model": "a", "prompt": "x", "best_of": 3}', 400, "best_of"),
        (
            b'{"model": "a", "prompt": "x", "frequency_penalty": 3}',
            400,
            "must be a number from -2 to 2",
        ),
        (b'{"model": "a", "prompt": "x", "logit_bias": {"259": 1}}', 400, "logit_bias holds token 259"),
        (b'{"model": "a", "prompt": "x", "logit_bias": {"x": 1}}', 400, "logit_bias must be an object such as"),
        (b'{"model": "a", "prompt": "x", "logit_bias": {"5": 101}}', 400, "values -100 to 100"),
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
    status, answer = post(address, b" " * 2**20)
    assert status == 413 and "589,824" in answer["error"]["message"]  # 1 KiB a token, and a little
    head = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the application")

    app_with_guard: Any = BodyGuard(app, Keys(None, None), seconds=0.2)
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
