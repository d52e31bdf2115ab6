"""What a request may say: values that change nothing are taken, everything else is refused in the API's own words."""

import json
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import BaseModel, ValidationError

from deltacome.serve.http.messages import CalledFunction, Function, Message, Tool, ToolCall
from deltacome.serve.http.protocol import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from deltacome.serve.http.tokens import DetokenizeRequest, TokenizeRequest
from deltacome.serve.http.wording import EXPECTED, describe
from serving import CHAT, post, raw

pytest_plugins = ["serving"]

NEUTRAL_IN_CHAT: dict[str, Any] = {
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "metadata": {"team": "x"},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": False,
    "presence_penalty": 0.0,
    "prompt_cache_key": "x",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "safety_identifier": "x",
    "service_tier": "flex",
    "stop": [],
    "store": False,
    "stream": False,
    "stream_options": {"include_usage": False, "include_obfuscation": True},
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "user": "x",
    "verbosity": "medium",
}
NEUTRAL_IN_COMPLETIONS: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {"50256": 0},
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "stop": [],
    "suffix": "",
    "top_p": 1,
    "user": "x",
}
ECHOED = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}


@pytest.mark.parametrize(("request_model", "known"), [(ChatRequest, ChatParams), (CompletionRequest, CompletionParams)])
def test_every_field_of_the_official_client_may_be_null(request_model: type[BaseModel], known: Any) -> None:
    required = {"model", "messages", "prompt"}
    optional = {*known.__annotations__, *request_model.model_fields} - required
    body = {"model": "a", "messages": CHAT, "prompt": "x"}
    own = {name: value for name, value in body.items() if name in request_model.model_fields}
    request_model.model_validate({**own, **dict.fromkeys(optional)})


def test_values_that_change_nothing_change_nothing(api: OpenAI) -> None:
    chat: Any = {"model": "a", "messages": CHAT, "max_tokens": 8, "temperature": 0}
    plain = api.chat.completions.create(**chat).choices[0].message
    assert api.chat.completions.create(**chat, extra_body=NEUTRAL_IN_CHAT).choices[0].message == plain
    nulls = dict.fromkeys(NEUTRAL_IN_CHAT)
    assert api.chat.completions.create(**chat, extra_body=nulls).choices[0].message == plain
    completion: Any = {"model": "a", "prompt": "Once", "max_tokens": 8, "temperature": 0}
    choice = api.completions.create(**completion).choices[0]
    assert api.completions.create(**completion, extra_body=NEUTRAL_IN_COMPLETIONS).choices[0] == choice
    assert choice.logprobs is None and choice.text
    # A conversation whose answers are sent back as they came.
    echoed = {**plain.model_dump(), **ECHOED}
    again: Any = [*CHAT, echoed, {"role": "user", "content": "And?"}]
    bare: Any = [*CHAT, {"role": "assistant", "content": plain.content}, again[-1]]
    answers = [
        api.chat.completions.create(**{**chat, "messages": messages}).choices[0].message for messages in (again, bare)
    ]
    assert answers[0] == answers[1]
    empty, null = (Message.model_validate({"role": "assistant", "content": content}).plain for content in ("", None))
    assert empty == null


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tool_choice", {"type": "custom", "custom": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "grammar"}),
        ("response_format", {"type": "text", "schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("unheard_of", 1),
        ("suffix", "x"),
        ("best_of", 2),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(address: str, field: str, value: Any) -> None:
    path, own = ("/v1/chat/completions", {"messages": CHAT})
    if field in ("suffix", "best_of"):
        path, own = "/v1/completions", {"prompt": "x"}
    status, answer = post(address, json.dumps({"model": "a", **own, field: value}).encode(), path)
    assert status == 400
    message, param = answer["error"]["message"], answer["error"]["param"]
    assert param.startswith(field) and answer["error"]["type"] == "invalid_request_error"
    expected = f"{param} must be {EXPECTED.get(param.split('.')[-1])}"
    assert message in (f"{param} is not supported by this server; leave it out", expected)


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 2", "temperature"),
        ({"temperature": 3}, "temperature must be a number from 0 to 2", "temperature"),
        ({"stop": "x" * 257}, "stop must be a text, or up to 4 texts, each of 1 to 256 characters", "stop"),
        ({"stop": ["x", ""]}, "stop must be a text, or up to 4 texts, each of 1 to 256 characters", "stop"),
        ({"messages": []}, "messages must be a list of at least one message", "messages"),
        (
            {"messages": [*CHAT, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[1].content must be a text or a list of parts of type text; images, audio and files are not "
            "supported",
            "messages[1].content",
        ),
        (
            {"messages": [{"role": "function", "content": "x"}]},
            "messages[0].role must be system, developer, user, assistant or tool",
            "messages[0].role",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing; it must be", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not valid Unicode text", "messages[0].content"),
        ({"model": None}, "model must be the name of a model", "model"),
        ({"stream_options": {"include_usage": "x"}}, "must be true or false", "stream_options.include_usage"),
    ],
)
def test_a_field_that_is_wrong_is_named_in_words(fields: dict[str, Any], said: str, param: str) -> None:
    body = {"model": "a", "messages": CHAT, **fields}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    error: Any = caught.value.errors()[0]
    found, where = describe({**error, "loc": ("body", *error["loc"])}, body)
    assert said in found and where == param


@pytest.mark.parametrize("data", [b"\x00\xff garbage\r\n\r\n", b"GET /" + b"x" * 70_000], ids=["garbage", "headers"])
def test_what_is_not_http(address: str, data: bytes) -> None:
    status, answer = raw(address, data)
    assert status == 400 and "not HTTP" in json.loads(answer)["error"]["message"]


def test_there_are_words_for_every_field() -> None:
    models = (ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, TokenizeRequest, DetokenizeRequest)
    models += (Message, Tool, Function, ToolCall, CalledFunction)
    neutral = {
        name
        for model in models
        for name, field in model.model_fields.items()
        if field.description and field.description.startswith("Not supported")
    }
    assert {name for model in models for name in model.model_fields} - neutral <= EXPECTED.keys()


@pytest.mark.parametrize(
    ("request_text", "status", "said"),
    [
        ("POST /v1/completions|application/json|{", 400, "the body is not JSON: "),
        ('POST /v1/completions|application/json|{"model": "\xff"}', 400, "not JSON in UTF-8"),
        ("POST /v1/completions|application/json|" + "[" * 100_000, 400, "not JSON in UTF-8"),
        ("POST /v1/completions|application/json|" + "1" * 5000, 400, "not JSON in UTF-8"),
        ("POST /v1/completions|application/json|[1]", 400, "must be a JSON object"),
        ("POST /v1/completions|application/json|null", 400, "must be a JSON object"),
        ("POST /v1/completions|application/json|", 400, "must be a JSON object"),
        ("POST /v1/completions||{}", 415, "Content-Type: application/json"),
        ("POST /v1/completions|text/plain|{}", 415, "Content-Type: application/json"),
        ("POST /v1/completions|application/json; charset=utf-8|{}", 400, "model is missing"),
        ("GET /v1/completions||", 405, "GET is not for /v1/completions; it takes POST"),
        ("DELETE /v1/models||", 405, "it takes GET"),
        ("POST /v1/nothing|application/json|{}", 404, "there is no /v1/nothing here"),
        ("GET /nothing||", 404, "there is no /nothing here"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_every_error_has_the_apis_form(address: str, request_text: str, status: int, said: str) -> None:
    line, kind, body = [*request_text.split("|", 2), "", ""][:3]
    content = body.encode("latin-1")
    head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    head += f"Content-Type: {kind}\r\n" if kind else ""
    found, answer = raw(address, head.encode() + b"\r\n" + content)
    error = json.loads(answer)["error"]
    assert found == status and said in error["message"], answer
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
