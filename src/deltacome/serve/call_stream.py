"""Calls of tools, found in text as it comes."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deltacome.serve.calls import ARGUMENTS_MARK, ID_MARK, CallFormat, is_text, properties, resolved

HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')
FUNCTION = re.compile(r"<function=([^>\n]*)>")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
END = re.compile(r"\s*</function>")

Schemas = Mapping[str, Mapping[str, Any]]  # of the arguments, by the tools' names


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

    schemas: of the tools' arguments. is_parallel: whether more than the first call counts. count: calls so far.
    """

    def __init__(self, form: CallFormat, schemas: Schemas, is_parallel: bool) -> None:
        self.form, self.schemas, self.is_parallel = form, schemas, is_parallel
        self.marks = [mark for mark in (form.opening, form.closing) if mark]
        self.count = 0
        self._call: Call | None = None
        self._is_text, self._has_text = True, False
        self._is_open = False  # just behind an opening mark
        self._held = ""  # spaces, until something follows them, and what may be the beginning of a mark
        self._text: list[str] = []
        self._parts: list[CallPart] = []

    def add(self, text: str) -> Said:
        """What more text says."""
        for character in text:
            if self._call is not None:
                self._add_to_call(self._call, character)
            elif self._begins_call(character):
                self._held, self._is_open, self._call = "", False, CALLS[self.form.style](self.schemas)
                self._add_to_call(self._call, character)
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

    def _begins_call(self, character: str) -> bool:
        if self.form.style == "object":
            return character == "{" and (not self._is_text or self._may_begin_bare())
        return self._is_open and not character.isspace()

    def _may_begin_bare(self) -> bool:
        return self.form.is_bare and not self._has_text and not self._held.strip()

    def _add_to_call(self, call: "Call", character: str) -> None:
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
            self._is_open = mark == self.form.opening
            self._is_text = not self._is_open
        else:
            places = range(len(self._held) + 1)
            end = next(place for place in places if self._may_begin_mark(self._held[place:].lstrip()))
            out, self._held = self._held[:end], self._held[end:]
        self._has_text = self._has_text or out != ""
        self._text.append(out)

    def _may_begin_mark(self, text: str) -> bool:
        return any(mark.startswith(text) for mark in self.marks)


class Call(Protocol):
    """A call as its text comes. text: all of it. is_told: whether it is one of the tools', and that has been told.

    is_whole: whether it has ended, as a call or as something else.
    """

    text: str
    is_told: bool

    @property
    def is_whole(self) -> bool: ...

    def add(self, character: str) -> CallPart | None:
        """What one more character tells."""

    def read(self) -> CallPart | None:
        """Of a whole one that nothing was told of; None if it is none."""


class _Nesting:
    """Where one is in JSON. depth: of open objects and lists."""

    def __init__(self) -> None:
        self.depth, self._in_string, self._is_escaped = 0, False, False

    def add(self, character: str) -> None:
        if self._in_string:
            self._in_string = character != '"' or self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1


class _ObjectCall:
    """`{"name": ..., "arguments": {...}}`."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas, self.text, self.is_told, self._nesting = schemas, "", False, _Nesting()

    @property
    def is_whole(self) -> bool:
        return self._nesting.depth == 0

    def add(self, character: str) -> CallPart | None:
        before, self.text = self._nesting.depth, self.text + character
        self._nesting.add(character)
        if self.is_told:
            return CallPart(character) if max(before, self._nesting.depth) > 1 else None
        head = HEAD.fullmatch(self.text) if character == "{" and self._nesting.depth == 2 else None
        name = None if head is None else _read(head[1])
        if name not in self.schemas:
            return None
        self.is_told = True
        return CallPart(character, name)

    def read(self) -> CallPart | None:
        content = _read(self.text)
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in self.schemas:
            return None
        arguments: Any = next((content[key] for key in ("arguments", "parameters") if key in content), {})
        return CallPart(arguments if isinstance(arguments, str) else json.dumps(arguments), name)


class _NamedCall:
    """A name, perhaps a mark and an identifier, a mark, and an object of arguments."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas, self.text, self.is_told, self.is_whole = schemas, "", False, False
        self._nesting = _Nesting()

    def add(self, character: str) -> CallPart | None:
        self.text += character
        if self.is_told:
            if character.isspace() and not self._nesting.depth:
                return None
            self._nesting.add(character)
            self.is_whole = self._nesting.depth <= 0
            return CallPart(character)
        if not self.text.endswith(ARGUMENTS_MARK):
            return None
        name = self.text.removesuffix(ARGUMENTS_MARK).partition(ID_MARK)[0].strip()
        self.is_told = name in self.schemas
        self.is_whole = not self.is_told
        return CallPart("", name) if self.is_told else None

    def read(self) -> None:
        return None


class _MarkupCall:
    """`<function=NAME>`, its arguments as `<parameter=KEY>`, each told when it has ended, and `</function>`."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas, self.text, self.is_told, self.is_whole = schemas, "", False, False
        self._rest = ""  # of the text, that is not read yet
        self._schema: Mapping[str, Any] = {}
        self._keys: set[str] = set()

    def add(self, character: str) -> CallPart | None:
        self.text, self._rest = self.text + character, self._rest + character
        if self.is_told:
            return self._add_argument() if character == ">" else None
        begins = self._rest.startswith("<function=") or "<function=".startswith(self._rest)
        found = FUNCTION.fullmatch(self._rest)
        self.is_told = found is not None and found[1] in self.schemas
        self.is_whole = not begins or (found is not None and not self.is_told)
        if found is None or not self.is_told:
            return None
        self._rest, self._schema = "", self.schemas[found[1]]
        return CallPart("{", found[1])

    def _add_argument(self) -> CallPart | None:
        if END.fullmatch(self._rest):
            self.is_whole = True
            return CallPart("}")
        found = PARAMETER.fullmatch(self._rest)
        if found is None:
            return None
        self._rest, (key, text) = "", found.groups()
        if key in self._keys:
            return None
        is_first, schema = not self._keys, resolved(properties(self._schema).get(key), self._schema)
        self._keys.add(key)
        value = None if is_text(schema) else _read(text)
        if value is None and (is_text(schema) or text.strip() != "null"):
            value = text
        return CallPart(f"{'' if is_first else ', '}{json.dumps(key)}: {json.dumps(value)}")

    def read(self) -> None:
        return None


CALLS: dict[str, Callable[[Schemas], Call]] = {"object": _ObjectCall, "named": _NamedCall, "markup": _MarkupCall}


def _read(text: str) -> Any:
    """JSON, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
