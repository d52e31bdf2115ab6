"""`response_format`: whatever the model would say, the answer is JSON of the schema; strangers' schemas do no harm."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from conftest import make_tokenizer
from deltacome.serve.engine.scheduler import Limits
from deltacome.serve.http import completions
from serving import CHAT, client, make_app, post_json, serving, until

pytest_plugins = ["serving"]

STEP = {"properties": {"say": {"type": "string", "maxLength": 6}}, "required": ["say"], "additionalProperties": False}
SCHEMA: dict[str, Any] = {
    "$defs": {"step": {"type": "object", **STEP}},
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bb", "ccc"]},
        "count": {"type": "integer", "minimum": 10, "maximum": 99},
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    },
    "required": ["kind", "count", "steps", "code"],
    "additionalProperties": False,
}


def held_to(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


FORMAT = held_to(SCHEMA)
COMPACT = {str(make_tokenizer()(sign).input_ids[0]): -100 for sign in " \n"}  # a random model would indent for ever


def check(text: str | None, schema: dict[str, Any] = SCHEMA) -> None:
    jsonschema.validate(json.loads(text or ""), schema)


def test_answers_of_all_models_at_once_keep_to_their_schemas(api: OpenAI) -> None:
    """Beside others that keep to none, and say what they say alone."""
    other = {
        "type": "object",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }

    def ask(number: int) -> tuple[int, Any]:
        form: Any = {0: FORMAT, 1: held_to(other), 2: {"type": "text"}}[number % 3]
        model, temperature = ("base", "a", "b")[number // 3 % 3], number % 2
        options: Any = {"logit_bias": COMPACT, **({"n": 2, "seed": number} if temperature else {})}
        answer = api.chat.completions.create(
            model=model, messages=CHAT, temperature=temperature, response_format=form, max_tokens=250, **options
        )
        return number % 3, answer

    with ThreadPoolExecutor(18) as pool:
        answers = list(pool.map(ask, range(18)))
    for kind, answer in answers:
        for choice in answer.choices:
            if kind < 2:
                assert choice.finish_reason == "stop"
                check(choice.message.content, (SCHEMA, other)[kind])
    texts = {answer.choices[0].message.content for kind, answer in answers if kind == 0}
    assert len(texts) > 3
    alone = [ask(number)[1].choices[0].message.content for number in (2, 8)]
    assert [answers[number][1].choices[0].message.content for number in (2, 8)] == alone


def test_streams_logprobs_and_stop_strings(api: OpenAI) -> None:
    options: Any = {"model": "a", "messages": CHAT, "temperature": 0, "response_format": FORMAT, "logprobs": True}
    options["logit_bias"] = COMPACT
    whole = api.chat.completions.create(**options, top_logprobs=1).choices[0]
    check(whole.message.content)
    parts = list(api.chat.completions.create(**options, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].choices[0].finish_reason == "stop"
    # They are the model's own, so that what the schema forbids is among the likeliest.
    assert whole.logprobs and whole.logprobs.content
    assert any(token.token != token.top_logprobs[0].token for token in whole.logprobs.content)
    assert whole.message.content.encode() == b"".join(bytes(token.bytes or []) for token in whole.logprobs.content)
    stopped = api.chat.completions.create(**options, stop='"count').choices[0]
    assert whole.message.content and stopped.message.content == whole.message.content.partition('"count')[0]
    short = api.chat.completions.create(**options, max_tokens=5).choices[0]
    assert short.finish_reason == "length" and whole.message.content.startswith(short.message.content or "x")


def test_any_object(api: OpenAI) -> None:
    form: Any = {"type": "json_object"}
    found = []
    for seed in range(6):
        choice = api.chat.completions.create(
            model="b", messages=CHAT, response_format=form, max_tokens=120, seed=seed
        ).choices[0]
        assert choice.message.content and choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            found.append(json.loads(choice.message.content))
    assert all(isinstance(each, dict) for each in found)
    no_schema: Any = {"type": "json_schema", "json_schema": {"name": "x"}}
    text = (
        api.chat.completions.create(model="b", messages=CHAT, response_format=no_schema, max_tokens=9)
        .choices[0]
        .message.content
    )
    assert text and text.startswith("{")


def test_the_clients_own_parser(api: OpenAI) -> None:
    class Answer(BaseModel):
        number: int | None
        words: list[bool]

    found = []
    for seed in range(20):
        try:
            answer = api.chat.completions.parse(
                model="a", messages=CHAT, response_format=Answer, seed=seed, max_tokens=60, logit_bias=COMPACT
            )
        except openai.LengthFinishReasonError:
            continue
        found.append(answer.choices[0].message.parsed)
    assert found and all(isinstance(each, Answer) for each in found)


def test_rows_that_wait_again_go_on_where_they_were(folder: Path) -> None:
    """A cache with too little room puts answers back into the queue, and they are read again."""
    with serving(make_app(folder)) as address:
        ask: Any = {"messages": CHAT, "temperature": 0, "response_format": FORMAT, "max_tokens": 250}
        ask["logit_bias"] = COMPACT
        alone = [client(address).chat.completions.create(model=name, **ask) for name in ("a", "b", "base")]
    with serving(make_app(folder, limits=Limits(cache=150))) as address, ThreadPoolExecutor(6) as pool:
        api = client(address)
        together = list(pool.map(lambda name: api.chat.completions.create(model=name, **ask), ["a", "b", "base"] * 2))
    said = [answer.choices[0].message.content for answer in together]
    assert said == [answer.choices[0].message.content for answer in alone] * 2


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "deep": (nested(200), "recursion limit"),
    "combinations": (
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(12)]},
        "",
    ),
    "endless": ({"$ref": "#"}, "no text keeps to it"),
    "endless twice": ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}, ""),
    "elsewhere": ({"$ref": "http://127.0.0.1/x.json"}, "retrieving"),
    "file": ({"$ref": "file:///etc/passwd"}, "retrieving"),
    "multiples": ({"type": "integer", "multipleOf": 10**12 + 39}, "multipleOf"),
    "endless multiples": ({"type": "integer", "multipleOf": 10**400}, "multipleOf"),
    "multiples together": ({"allOf": [{"type": "integer", "multipleOf": p} for p in (97, 89, 83, 79)]}, "multipleOf"),
    "small multiples": ({"type": "number", "multipleOf": 1.2345678e-5}, "multipleOf"),
    "expression": ({"type": "string", "pattern": "((a|b){1,900}c){1,900}(?=x)"}, "look-ahead"),
    "huge expression": ({"type": "string", "pattern": "(" * 400 + "a" + "{1,50})" * 400}, ""),
    "parts": ({"enum": list(range(5_001))}, "5,000 are allowed"),
    "nothing": ({"type": "string", "enum": []}, ""),
    "not": ({"not": {"type": "string"}}, "not"),
    "no type": ({"type": "sentence"}, "sentence"),
    "no text": ({"const": "\ud800"}, ""),
    "no object": ({"properties": 5}, "properties"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_schemas_that_cannot_be_kept_to(address: str, name: str) -> None:
    schema, said = HOSTILE[name]
    body = {"model": "a", "messages": CHAT, "response_format": held_to(schema)}
    begun = time.monotonic()
    status, answer = post_json(address, "/v1/chat/completions", body)
    assert status == 400 and time.monotonic() - begun < 8, answer
    message = answer["error"]["message"]
    assert message.startswith("the schema cannot be kept to: ") and said in message and "\n" not in message
    assert len(message) < 400 and answer["error"]["code"] == "invalid_schema"


def test_a_schema_that_is_too_much_midway(address: str, api: OpenAI) -> None:
    """Its end is told, whole or in a stream, and the server serves on."""
    many = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1200)}}
    schema = {"type": "object", "properties": {"a": {"const": "begin"}, "b": many}, "required": ["a", "b"]}
    body = {"model": "a", "messages": CHAT, "response_format": held_to(schema), "temperature": 0}
    status, answer = post_json(address, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] == "schema_too_complex"
    status, text = post_json(address, "/v1/chat/completions", {**body, "stream": True})
    assert status == 200 and '"delta":{"content":"b"}' in text
    assert "schema_too_complex" in text and "data: [DONE]" in text
    assert api.completions.create(model="a", prompt="x", max_tokens=1).choices


def test_a_grammar_that_does_not_come_in_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "COMPILE_SECONDS", 0.0)
    schema = {"type": "object", "properties": {f"q{i}": {"type": "null"} for i in range(200)}}
    body = {"model": "a", "messages": CHAT, "response_format": held_to(schema)}
    status, answer = post_json(address, "/v1/chat/completions", body)
    assert status == 503 and "make it simpler" in answer["error"]["message"]
    monkeypatch.undo()
    until(lambda: post_json(address, "/v1/chat/completions", {**body, "max_tokens": 1})[0] == 200)
