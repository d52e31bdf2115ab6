"""How models write calls of tools: the forms of it, how a chat template tells its own, and grammars for them."""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deltacome.serve.grammars import GrammarError, with_options

ARGUMENTS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"
MOST_REFERENCES = 20  # of a schema to a schema to a schema


@dataclass(frozen=True)
class CallFormat:
    """A form of calls.

    opening: the mark before the first, or, where there is a closing one or a call is named, before each. closing: after
    each. style: what a call is: an object `{"name": ..., ARGUMENTS: {...}}`; its name, a mark and an object of
    arguments; or markup with arguments as `<parameter=KEY>`. arguments: their key. first, separator, last: what a
    grammar puts around calls. between: signs that may be there, besides spaces. is_bare: whether an answer that begins
    as an object may be a call without a mark.
    """

    opening: str
    closing: str
    arguments: str = "arguments"
    first: str = ""
    separator: str = "\n"
    last: str = ""
    between: str = ""
    is_bare: bool = False
    style: Literal["object", "named", "markup"] = "object"

    @property
    def marks(self) -> list[str]:
        """Those that a tokenizer may have as special tokens."""
        named = [ARGUMENTS_MARK, ID_MARK] if self.style == "named" else []
        return [mark for mark in (self.opening, self.closing, *named) if mark]

    def identifier(self) -> str:
        """Of another call."""
        return uuid.uuid4().hex[:9] if self.opening == "[TOOL_CALLS]" else f"call_{uuid.uuid4().hex[:24]}"


FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>"),
    "llama3": CallFormat("<|python_tag|>", "", "parameters", separator="; ", between=";", is_bare=True),
    "mistral": CallFormat("[TOOL_CALLS]", "", first="[", separator=", ", last="]", between="[],"),
    "mistral-args": CallFormat("[TOOL_CALLS]", "", separator="", style="named"),
    "qwen3-coder": CallFormat("<tool_call>", "</tool_call>", style="markup"),
}


def find_format(template: str | None) -> CallFormat | None:
    """The form that a chat template asks for, None if it cannot be told."""
    text = template or ""
    if "<tool_call>" in text:
        return FORMATS["qwen3-coder" if "<function=" in text else "hermes"]
    if "[TOOL_CALLS]" in text:
        return FORMATS["mistral-args" if ARGUMENTS_MARK in text else "mistral"]
    if "<|start_header_id|>" in text and '"parameters"' in text:
        return FORMATS["llama3"]
    return None


def markers(form: CallFormat, tokenizer: Any) -> dict[int, str]:
    """The form's marks that are special tokens of a tokenizer, which decoding leaves out otherwise."""
    special = {added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {special[text]: text for text in form.marks if text in special}


def calls_grammar(
    form: CallFormat,
    schemas: Mapping[str, dict[str, Any]],
    tokenizer: Any,
    is_parallel: bool,
    otherwise: dict[str, Any] | None = None,
) -> str:
    """The grammar of one call or several of these tools.

    Args:
        schemas: of the arguments, by the tools' names.
        is_parallel: whether there may be several calls.
        otherwise: the JSON schema of answers that call nothing, if there may be such.

    Raises:
        GrammarError: if a schema is larger than what is compiled, or this form has no place for it.
    """
    special = {text: f"<[{token}]>" for token, text in markers(form, tokenizer).items()}

    def mark(text: str) -> str:
        return special.get(text) or json.dumps(text)

    rules: list[str] = []
    names = []
    for number, (name, schema) in enumerate(schemas.items()):
        names.append(f"call_{number}")
        if form.style == "markup":
            rules += _markup_rules(number, name, with_options(schema))
        elif form.style == "named":
            rules.append(f"call_{number}: {json.dumps(name)} {mark(ARGUMENTS_MARK)} {_json_rule(schema)}")
        else:
            head = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
            rules.append(f'call_{number}: {json.dumps(head)} {_json_rule(schema)} "}}"')
    rules.append(f"call: {' | '.join(names)}")
    opening = mark(form.opening)
    if form.closing:
        one = f'{opening} "\\n" call "\\n" {mark(form.closing)}'
    else:
        one = f"{opening} call" if form.style == "named" else "call"
    rules.append(f"one: {one}")
    before = [] if form.closing or form.style == "named" or form.is_bare else [opening]
    separator = json.dumps(form.separator) + " " if form.separator else ""
    more = [f"({separator}one)*"] if is_parallel else []
    first, last = ([json.dumps(text)] if text else [] for text in (form.first, form.last))
    rules.append(f"calls: {' '.join([*before, *first, 'one', *more, *last])}")
    if otherwise is not None:
        rules.append(f"otherwise: {_json_rule(otherwise)}")
    return "\n".join(["%llguidance {}", f"start: calls{'' if otherwise is None else ' | otherwise'}", *rules])


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(with_options(schema))}"


def _markup_rules(number: int, name: str, schema: dict[str, Any]) -> Iterator[str]:
    """Of one tool's calls, whose arguments come in the order of the schema."""
    end = "\n</parameter>\n"
    required, parts = schema.get("required", []), []
    for place, (key, own) in enumerate(properties(schema).items()):
        part = f"argument_{number}_{place}"
        head, value = json.dumps(f"<parameter={key}>\n"), resolved(own, schema)
        if choices := _choices(value):
            words = " | ".join(map(json.dumps, choices))
            yield f"{part}: {head} ({words}) {json.dumps(end)}"
        elif is_text(value):
            yield f"{part}: {head} value_{number}_{place}"
            yield f"value_{number}_{place}[suffix={json.dumps(end)}]: /{_expression(key, value)}/"
        else:
            shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            yield f"{part}: {head} {_json_rule({**value, **shared})} {json.dumps(end)}"
        parts.append(part if key in required else f"{part}?")
    yield f'call_{number}: {" ".join([json.dumps(f"<function={name}>" + chr(10)), *parts])} "</function>"'


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's keys."""
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema, with what it refers to in the whole one put in its place."""
    for _ in range(MOST_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for key in reference[2:].split("/"):
            schema = schema.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(schema, Mapping) else None
    return schema if isinstance(schema, dict) else {}


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether all that a schema allows is text, which markup has as it is."""
    return schema.get("type") == "string" or bool(_choices(schema))


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """The texts that a schema allows, if it names them; none if it does not, or allows something else too."""
    found = [schema["const"]] if "const" in schema else schema.get("enum")
    is_one = isinstance(found, list) and all(isinstance(choice, str) for choice in found)
    return found if is_one and found is not None else []


def _expression(key: str, schema: Mapping[str, Any]) -> str:
    """The regular expression of a text.

    Raises:
        GrammarError: if it has to keep to a pattern, which is not promised here.
    """
    if "pattern" in schema:
        raise GrammarError(f"{key} has a pattern, which is not kept to in the form of this model's calls; leave it out")
    least, most = (schema.get(key, "") for key in ("minLength", "maxLength"))
    return f"(?s:.){{{least or 0},{most}}}"
