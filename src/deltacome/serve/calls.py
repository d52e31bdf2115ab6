"""How models write calls of tools: the forms of it, grammars for them, and calls found in text as it comes."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltacome.serve.grammars import with_options

HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')


@dataclass(frozen=True)
class CallFormat:
    """A form of calls, each of them `{"name": ..., ARGUMENTS: {...}}`.

    opening: the mark before the first, or, where there is a closing one, before each. arguments: their key. first,
    separator, last: what a grammar puts around calls. between: signs that may be there, besides spaces. is_bare:
    whether an answer that begins as an object may be a call without a mark.
    """

    opening: str
    closing: str
    arguments: str = "arguments"
    first: str = ""
    separator: str = "\n"
    last: str = ""
    between: str = ""
    is_bare: bool = False

    def identifier(self) -> str:
        """Of another call."""
        return uuid.uuid4().hex[:9] if self is FORMATS["mistral"] else f"call_{uuid.uuid4().hex[:24]}"


FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>"),
    "llama3": CallFormat("<|python_tag|>", "", "parameters", separator="; ", between=";", is_bare=True),
    "mistral": CallFormat("[TOOL_CALLS]", "", first="[", separator=", ", last="]", between="[],"),
}


def find_format(template: str | None) -> CallFormat | None:
    """The form that a chat template asks for, None if it cannot be told."""
    text = template or ""
    if "<tool_call>" in text and "<function=" not in text:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in text and "[ARGS]" not in text:
        return FORMATS["mistral"]
    if "<|start_header_id|>" in text and '"parameters"' in text:
        return FORMATS["llama3"]
    return None


def markers(form: CallFormat, tokenizer: Any) -> dict[int, str]:
    """The form's marks that are special tokens of a tokenizer, which decoding leaves out otherwise."""
    special = {added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {special[text]: text for text in (form.opening, form.closing) if text in special}


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
        GrammarError: if a schema is larger than what is compiled.
    """
    special = {text: f"<[{token}]>" for token, text in markers(form, tokenizer).items()}

    def mark(text: str) -> str:
        return special.get(text) or json.dumps(text)

    rules, names = [], []
    for number, (name, schema) in enumerate(schemas.items()):
        names.append(f"call_{number}")
        head = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
        rules.append(f'call_{number}: {json.dumps(head)} %json {json.dumps(with_options(schema))} "}}"')
    rules.append(f"call: {' | '.join(names)}")
    if form.closing:  # marks around each
        rules.append(f'one: {mark(form.opening)} "\\n" call "\\n" {mark(form.closing)}')
        more = f"({json.dumps(form.separator)} one)*" if is_parallel else ""
        rules.append(f"calls: one {more}")
    else:
        more = f"({json.dumps(form.separator)} call)*" if is_parallel else ""
        opening = "" if form.is_bare else mark(form.opening)
        first, last = (json.dumps(text) if text else "" for text in (form.first, form.last))
        rules.append(f"calls: {opening} {first} call {more} {last}")
    if otherwise is None:
        start = "start: calls"
    else:
        start = f"start: calls | otherwise\notherwise: %json {json.dumps(with_options(otherwise))}"
    return "\n".join(["%llguidance {}", start, *rules])


@dataclass(frozen=True)
class CallPart:
    """What came of a call. index: its number in the answer. name, id: with its first part alone."""

    arguments: str
    name: str | None = None
    index: int = 0
    id: str | None = None


@dataclass(frozen=True)
class Said:
    """What came of an answer: text for the user, and parts of calls."""

    text: str = ""
    calls: Sequence[CallPart] = ()


class CallStream:
    """An answer's calls, found as its text comes.

    names: of the tools. is_parallel: whether more than the first call counts. count: calls so far.
    """

    def __init__(self, form: CallFormat, names: set[str], is_parallel: bool) -> None:
        self.form, self.names, self.is_parallel = form, names, is_parallel
        self.marks = [mark for mark in (form.opening, form.closing) if mark]
        self.count = 0
        self._call: _Call | None = None
        self._is_text, self._has_text = True, False
        self._held = ""  # spaces, until something follows them, and what may be the beginning of a mark
        self._text: list[str] = []
        self._parts: list[CallPart] = []

    def add(self, text: str) -> Said:
        """What more text says."""
        for character in text:
            if self._call is not None:
                self._add_to_call(self._call, character)
            elif character == "{" and (not self._is_text or self._may_begin_bare()):
                self._held, self._call = "", _Call(self.names)
                self._call.add(character)
            elif self._is_text or not (character.isspace() or character in self.form.between):
                self._is_text = True
                self._add_text(character)
        return self._take()

    def finish(self) -> Said:
        """The rest, when no more comes."""
        rest = self._held
        if self._call is not None and not self._call.is_told:
            rest = self._call.text
        if rest.strip() or not self.count:
            self._text.append(rest)
        return self._take()

    def _take(self) -> Said:
        said = Said("".join(self._text), tuple(self._parts))
        self._text, self._parts = [], []
        return said

    def _may_begin_bare(self) -> bool:
        return self.form.is_bare and not self._has_text and not self._held.strip()

    def _add_to_call(self, call: "_Call", character: str) -> None:
        part = call.add(character)
        if part is not None:
            self._tell(part)
        if not call.is_whole:
            return
        self._call, self._is_text = None, False
        if call.is_told:
            return
        part = call.read()
        if part is None:  # it was something else
            self._text.append(call.text)
            self._is_text = self._has_text = True
        else:
            self._tell(part)

    def _tell(self, part: CallPart) -> None:
        if part.name is not None:
            self.count += 1
            part = replace(part, id=self.form.identifier())
        part = replace(part, index=self.count - 1)
        if part.index and not self.is_parallel:
            return
        if self._parts and self._parts[-1].index == part.index:
            part = replace(self._parts[-1], arguments=self._parts.pop().arguments + part.arguments)
        self._parts.append(part)

    def _add_text(self, character: str) -> None:
        self._held += character
        mark = next((mark for mark in self.marks if self._held.endswith(mark)), None)
        if mark is not None:
            out, self._held = self._held.removesuffix(mark).rstrip(), ""
            self._is_text = mark == self.form.closing
        else:
            places = range(len(self._held) + 1)
            end = next(place for place in places if self._may_begin_mark(self._held[place:].lstrip()))
            out, self._held = self._held[:end], self._held[end:]
        self._has_text = self._has_text or out != ""
        self._text.append(out)

    def _may_begin_mark(self, text: str) -> bool:
        return any(mark.startswith(text) for mark in self.marks)


class _Call:
    """An object as it comes; that it is a call of one of these names, and its arguments, are told as they come."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.text, self.is_told = names, "", False
        self._depth, self._in_string, self._is_escaped = 0, False, False

    @property
    def is_whole(self) -> bool:
        return self._depth == 0

    def add(self, character: str) -> CallPart | None:
        before, self.text = self._depth, self.text + character
        if self._in_string:
            self._in_string = character != '"' or self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self.is_told:
            return CallPart(character) if max(before, self._depth) > 1 else None
        head = HEAD.fullmatch(self.text) if character == "{" and self._depth == 2 else None
        name = None if head is None else _read(head[1])
        if name not in self.names:
            return None
        self.is_told = True
        return CallPart(character, name)

    def read(self) -> CallPart | None:
        """A whole object as a call, None if it is none."""
        content = _read(self.text)
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in self.names:
            return None
        arguments: Any = next((content[key] for key in ("arguments", "parameters") if key in content), {})
        return CallPart(arguments if isinstance(arguments, str) else json.dumps(arguments), name)


def _read(text: str) -> Any:
    """JSON, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
