"""`tools`: calls in the form of each kind of model, found in what it says, or required of it; and what follows them."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from conftest import make_tokenizer
from deltacome.data import Encoder
from deltacome.errors import DeltacomeError
from deltacome.serve.call_stream import CallStream
from deltacome.serve.calls import FORMATS, calls_grammar, find_format
from deltacome.serve.engine.text import TextStream
from deltacome.serve.grammars import Grammars
from deltacome.serve.pieces import Pieces
from serving import CHAT, client, make_app, post_json, serving

pytest_plugins = ["serving"]

COMPACT = {str(make_tokenizer()(sign).input_ids[0]): -100 for sign in " \n"}  # a random model would indent for ever

# As small as may be, in the manner of the models'.
TEMPLATES = {
    "hermes": (
        "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t.function.name }} {% endfor %}</tools>"
        "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        '{% for t in tools or [] %}{{ t.function.name }} {"name": name, "parameters": values}{% endfor %}'
        "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}"
        '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
        "{{ c.function.arguments | tojson }}}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>{% endif %}"
    ),
    "mistral": (
        "{% for t in tools or [] %}[TOOL]{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{% endif %}"
        "{% endfor %}"
    ),
    "mistral-args": (
        "{% for t in tools or [] %}[TOOL]{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    ),
    "qwen3-coder": (
        "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t.function.name }} {% endfor %}</tools>"
        "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
        "{% for key, value in c.function.arguments.items() %}<parameter={{ key }}>\n{{ value }}\n</parameter>\n"
        "{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
MARKS = {"mistral": ["[TOOL_CALLS]"], "mistral-args": ["[ARGS]"]}  # that are special tokens; the model has room for one
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]


@pytest.fixture(scope="module", params=TEMPLATES)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tool_api(form: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Of a server whose models have a template of that form; Mistral's marks are special tokens there."""
    place = tmp_path_factory.mktemp("tools")
    shutil.copytree(folder / "base", place / "base")
    template = place / "template.jinja"
    template.write_text(TEMPLATES[form])
    if form in MARKS:
        with_marks(form).save_pretrained(place / "base")
    app = make_app(place, deltas={} if form in MARKS else {"a": folder / "deltas/a"}, chat_template=str(template))
    with serving(app) as address:
        yield client(address)


def with_marks(form: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS.get(form, [])})
    return tokenizer


def check(calls: Any, names: set[str]) -> None:
    assert calls
    for call in calls:
        assert call.type == "function" and call.id and call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            jsonschema.validate(arguments, WEATHER)
        else:
            assert arguments == {}
    assert len({call.id for call in calls}) == len(calls)


def test_calls_that_are_required(tool_api: OpenAI) -> None:
    model = [found.id for found in tool_api.models.list()][-1]
    counts = []
    for seed in range(8):
        ask: Any = {"model": model, "messages": CHAT, "tools": TOOLS, "tool_choice": "required", "seed": seed}
        ask["logit_bias"] = COMPACT
        choice = tool_api.chat.completions.create(**ask, max_tokens=200).choices[0]
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        check(choice.message.tool_calls, {"weather", "now"})
        counts.append(len(choice.message.tool_calls or []))
        one = tool_api.chat.completions.create(**ask, parallel_tool_calls=False, max_tokens=200).choices[0]
        assert one.finish_reason == "tool_calls" and len(one.message.tool_calls or []) == 1
    assert counts


def test_a_named_tool_whole_and_streamed(tool_api: OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    ask: Any = {"model": "base", "messages": CHAT, "tools": TOOLS, "tool_choice": named, "temperature": 0, "n": 2}
    ask |= {"parallel_tool_calls": False, "logit_bias": COMPACT}
    whole = tool_api.chat.completions.create(**ask)
    for choice in whole.choices:
        check(choice.message.tool_calls, {"weather"})
    with tool_api.chat.completions.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    for choice, streamed in zip(whole.choices, final.choices, strict=True):
        assert streamed.finish_reason == "tool_calls"
        found = [(call.function.name, call.function.arguments) for call in streamed.message.tool_calls or []]
        assert found == [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    parts = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(parts) > 4  # as they come


def test_a_schema_or_a_call(tool_api: OpenAI) -> None:
    """With both, an answer is one of the two, of whichever the model makes its first token."""
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(12):
        choice = tool_api.chat.completions.create(
            model="base",
            messages=CHAT,
            tools=TOOLS,
            response_format=form,
            seed=seed,
            max_tokens=200,
            logit_bias=COMPACT,
        ).choices[0]
        if choice.finish_reason == "tool_calls":
            check(choice.message.tool_calls, {"weather", "now"})
        elif choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content or ""), schema)
        kinds.add(choice.finish_reason)
    assert kinds & {"tool_calls", "stop"}


def test_a_conversation_with_calls(tool_api: OpenAI, form: str) -> None:
    """An answer's calls, sent back as they came, with what the tool said, are in the prompt."""
    named: Any = {"type": "function", "function": {"name": "weather"}}
    ask: Any = {"model": "base", "tools": TOOLS, "temperature": 0, "logit_bias": COMPACT}
    answer = tool_api.chat.completions.create(**ask, messages=CHAT, tool_choice=named, parallel_tool_calls=False)
    message = answer.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
    conversation: Any = [*CHAT, message.model_dump(), result]
    again = tool_api.chat.completions.create(**ask, messages=conversation, max_tokens=1)
    plain = [
        *CHAT,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"function": {"name": "weather", "arguments": json.loads(message.tool_calls[0].function.arguments)}}
            ],
        },
        {"role": "tool", "content": "Rain."},
    ]
    tokenizer = with_marks(form)
    tokenizer.chat_template = TEMPLATES[form]
    assert again.usage and answer.usage
    difference = len(Encoder(tokenizer).prompt(plain, tools=TOOLS)) - len(Encoder(tokenizer).prompt(CHAT, tools=TOOLS))
    assert again.usage.prompt_tokens - answer.usage.prompt_tokens == difference
    without = tool_api.chat.completions.create(**ask, messages=CHAT, tool_choice="none", max_tokens=1)
    bare = tool_api.chat.completions.create(model="base", messages=CHAT, max_tokens=1)
    assert without.usage and bare.usage and without.usage.prompt_tokens == bare.usage.prompt_tokens


def test_an_answer_that_is_begun(api: OpenAI) -> None:
    """The last message goes on, whatever template it goes through, and is not in the answer."""
    begun: Any = [*CHAT, {"role": "assistant", "content": "Well, it"}]
    options: Any = {"model": "a", "temperature": 0, "max_tokens": 8}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    answer = api.chat.completions.create(**options, messages=begun, extra_body=goes_on)
    prompt = make_tokenizer().apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) + "Well, it"
    assert answer.choices[0].message.content == api.completions.create(**options, prompt=prompt).choices[0].text
    assert answer.usage and answer.usage.prompt_tokens == len(make_tokenizer()(prompt).input_ids)
    unbegun = api.chat.completions.create(**options, messages=CHAT, extra_body={"add_generation_prompt": False})
    assert unbegun.usage
    assert unbegun.usage.prompt_tokens == len(make_tokenizer().apply_chat_template(CHAT, tokenize=True).input_ids)
    for extra, messages in (({**goes_on, "add_generation_prompt": True}, begun), (goes_on, CHAT)):
        with pytest.raises(openai.BadRequestError, match="needs a last message of the assistant's"):
            api.chat.completions.create(**options, messages=messages, extra_body=extra)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": TOOLS}, "the chat template of this model has no place for tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, '"x", which is not among'),
        ({"tool_choice": "required"}, "tool_choice requires a call, and there are no tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name must be"),
        ({"tools": [{"type": "web_search"}]}, 'tools[0].type must be "text" in a part of a message, "function" of'),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters is not the schema of an object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]},
            "tools[0].function.parameters is not valid Unicode text",
        ),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "to have a tool_call_id if its role is tool"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "x"}]}, "tool_call_id"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments is not a JSON object in a text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            },
            "no place for tool_calls",
        ),
    ],
)
def test_tools_that_are_refused(address: str, fields: dict[str, Any], said: str) -> None:
    status, answer = post_json(address, "/v1/chat/completions", {"model": "a", "messages": CHAT, **fields})
    assert status == 400 and said in answer["error"]["message"]


def test_tools_that_are_nested_too_deeply(tool_api: OpenAI) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for choice in ("auto", "required"):
        ask: Any = {"model": "base", "messages": CHAT, "tools": tools, "tool_choice": choice, "max_tokens": 3}
        with suppress(openai.BadRequestError):  # and nothing worse
            assert tool_api.chat.completions.create(**ask).choices
    assert tool_api.chat.completions.create(model="base", messages=CHAT, max_tokens=1).choices


def test_a_form_that_cannot_be_told(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for t in tools or [] %}{{ t.type }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    ask: Any = {"model": "base", "messages": CHAT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    ask["logit_bias"] = COMPACT
    with serving(make_app(folder, chat_template=str(template))) as address:
        status, answer = post_json(address, "/v1/chat/completions", ask)
        assert status == 400 and "--tool-format would" in answer["error"]["message"]
    with serving(make_app(folder, chat_template=str(template), tool_format="llama3")) as address:
        status, answer = post_json(address, "/v1/chat/completions", {**ask, "parallel_tool_calls": False})
        assert status == 200, answer
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


# Calls found in text, however it is cut.

F = '{"name": "f", "ARGUMENTS": {"a": "}{\\"", "b": [{"c": 1}]}}'
G = '{"ARGUMENTS": {"x": 2}, "name": "g"}'
SCHEMAS: dict[str, Any] = {
    "f": {
        "properties": {"a": {"$ref": "#/$defs/text"}, "c": {"enum": ["1", "2"]}},
        "$defs": {"text": {"type": "string"}},
    },
    "g": {},
}
ARGUMENTS = [("f", {"a": '}{"', "b": [{"c": 1}]}), ("g", {"x": 2})]


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "", ARGUMENTS),
        ("hermes", f"I look. \n<tool_call>{F}</tool_call>\n", "I look.", ARGUMENTS[:1]),
        ("hermes", "1 < 2, <tool> and </tool_call  ", "1 < 2, <tool> and </tool_call  ", []),
        ("hermes", '<tool_call>{"name": "h", "ARGUMENTS": {}}</tool_call> x', '{"name": "h", "ARGUMENTS": {}} x', []),
        ("hermes", '<tool_call>{"name": [], "ARGUMENTS": {}}', '{"name": [], "ARGUMENTS": {}}', []),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "ARGUMENTS": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
        ("hermes", '<tool_call>\n{"name": "f", "ARG', '{"name": "f", "ARG', []),
        ("hermes", F, F, []),
        ("llama3", f"{F}; {G}", "", ARGUMENTS),
        ("llama3", f"<|python_tag|>{F}", "", ARGUMENTS[:1]),
        ("llama3", '{"name": "Ada", "age": 36} is it', '{"name": "Ada", "age": 36} is it', []),
        ("llama3", f"So: {F}", f"So: {F}", []),
        ("llama3", "{not JSON} {", "{not JSON} {", []),
        ("mistral", f"[TOOL_CALLS][{F}, {G}]", "", ARGUMENTS),
        ("mistral", f"[TOOL_CALLS] [{F}]", "", ARGUMENTS[:1]),
        ("mistral", "as [TOOL_ and [1] say", "as [TOOL_ and [1] say", []),
        ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": "}{"}[TOOL_CALLS]g[ARGS] {}', "", [("f", {"a": "}{"}), ("g", {})]),
        ("mistral-args", 'So.\n[TOOL_CALLS]g[CALL_ID]a1B2c3D4e[ARGS]{"x": [1]}', "So.", [("g", {"x": [1]})]),
        ("mistral-args", "[TOOL_CALLS]h[ARGS]{} [x]", "h[ARGS]{} [x]", []),
        ("mistral-args", '[TOOL_CALLS][{"name": "f"}]', '[{"name": "f"}]', []),
        (
            "qwen3-coder",
            "Yes.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n<b>\n\n</parameter>\n<parameter=b>\n[1, 2]\n"
            "</parameter>\n<parameter=c>2</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n"
            "<parameter=x>\n1 < 2\n"
            "</parameter>\n<parameter=y>\nnull\n</parameter>\n<parameter=y>\n3\n</parameter>\n</function>\n</tool_call>",
            "Yes.",
            [("f", {"a": "1\n<b>\n", "b": [1, 2], "c": "2"}), ("g", {"x": "1 < 2", "y": None})],
        ),
        ("qwen3-coder", "<tool_call>\n<function=g>\n</function>\n</tool_call>", "", [("g", {})]),
        ("qwen3-coder", "<tool_call>\n<function=h>\n</function>\n</tool_call>", "<function=h>\n</function>", []),
        ("qwen3-coder", "<tool_call>\n<func> x </tool_call> y", "<func> x y", []),
        ("qwen3-coder", "a <function=g> </function>", "a <function=g> </function>", []),
    ],
)
def test_calls_in_text(form: str, text: str, said: str, calls: list[Any]) -> None:
    key = FORMATS[form].arguments
    text, said = text.replace("ARGUMENTS", key), said.replace("ARGUMENTS", key)
    own = random.Random(0)
    for longest in (1, 2, 7, 1000):
        for _ in range(20):
            stream, rest, found_text = CallStream(FORMATS[form], SCHEMAS, True), text, ""
            found: list[list[str]] = []
            parts = []
            while rest:
                size = own.randint(1, longest)
                one, rest = stream.add(rest[:size]), rest[size:]
                found_text += one.text
                parts += one.calls
            last = stream.finish()
            found_text += last.text
            for part in [*parts, *last.calls]:
                assert (part.name is None) == (part.id is None) == (part.index < len(found))
                if part.name is not None:
                    found.append([part.name, ""])
                found[part.index][1] += part.arguments
            assert found_text == said
            assert [(name, json.loads(arguments)) for name, arguments in found] == calls
            assert stream.count == len(calls)


def test_the_first_of_several_calls() -> None:
    stream = CallStream(FORMATS["hermes"], SCHEMAS, False)
    said = stream.add(f"<tool_call>{F}</tool_call><tool_call>{G}</tool_call>".replace("ARGUMENTS", "arguments"))
    assert [part.name for part in said.calls] == ["f"] and said.text == ""


def test_forms_are_told_by_templates() -> None:
    assert {name: find_format(template) for name, template in TEMPLATES.items()} == FORMATS
    assert find_format(None) is find_format("{{ messages }}") is None


def test_marks_that_are_special_tokens_are_text_where_they_are_wanted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tokens = tokenizer("é[TOOL_CALLS][é").input_ids
    for shown, expected in (({}, "é[é"), ({258: "[TOOL_CALLS]"}, "é[TOOL_CALLS][é")):
        stream = TextStream(tokenizer, [], shown)
        assert "".join(stream.add(token) for token in tokens) + stream.finish() == expected
    stopped = TextStream(tokenizer, ["S]["], {258: "[TOOL_CALLS]"})
    assert "".join(stopped.add(token) for token in tokens[:4]) == "é[TOOL_CALL" and stopped.is_stopped


@pytest.mark.parametrize("form", FORMATS)
def test_every_text_of_the_grammar_is_calls(form: str) -> None:
    tokenizer = make_tokenizer()
    grammars = Grammars(Pieces(tokenizer), {1})
    schemas: Any = {
        "weather": WEATHER,
        'n"w': {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}},
    }
    grammar = calls_grammar(FORMATS[form], schemas, tokenizer, True)
    own = random.Random(1)
    for _ in range(5):
        matcher, stream, tokens = grammars.matcher(grammar), CallStream(FORMATS[form], schemas, True), []
        for _ in range(400):
            token = own.choice(matcher.allowed(258).nonzero().flatten().tolist())
            if token == 1:
                break
            matcher.add(token)
            tokens.append(token)
            if matcher.is_complete:
                break
        said = stream.add(tokenizer.decode(tokens))
        assert said.text == stream.finish().text == ""
        assert len(said.calls) == stream.count > 0
        for number, call in enumerate(said.calls):
            if number + 1 < stream.count or matcher.is_complete or token == 1:
                jsonschema.validate(json.loads(call.arguments), schemas[call.name])


def test_patterns_are_not_promised_in_markup() -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "pattern": "^[A-Z]"}}}
    with pytest.raises(DeltacomeError, match="day has a pattern, which is not kept to"):
        calls_grammar(FORMATS["qwen3-coder"], {"f": schema}, make_tokenizer(), True)


def test_templates_that_refuse() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[5].content.x }}"
    with pytest.raises(DeltacomeError, match="the chat template refuses"):
        Encoder(tokenizer).prompt(CHAT)
