"""Conversations and tools, as requests have them."""

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from deltacome.serve.http.fields import NEUTRAL, Empty, Strict, Text

MOST_TOOLS = 128


def _is_object(text: str) -> str:
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        _check_text(found)
        if isinstance(found, dict):
            return text
    raise ValueError("not a JSON object in a text")


def _is_object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError("not the schema of an object")
    try:
        _check_text(schema)
    except (ValueError, RecursionError):
        raise ValueError("not valid Unicode text, or nested too deeply") from None
    return schema


def _check_text(content: Any) -> None:
    """See that a template can write it as JSON.

    Raises:
        UnicodeEncodeError: if it holds halves of characters.
        RecursionError: if it is nested too deeply.
    """
    json.dumps(content, ensure_ascii=False).encode()


class TextPart(BaseModel):
    model_config = Strict
    type: Literal["text"]
    text: Text


class CalledFunction(BaseModel):
    model_config = Strict
    name: Text
    arguments: Annotated[Text, AfterValidator(_is_object)]


class ToolCall(BaseModel):
    model_config = Strict
    id: Text
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    model_config = Strict
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="The assistant's.")
    tool_call_id: Text | None = Field(None, description="Of the call that a tool answers.")
    refusal: None = Field(None, description=NEUTRAL)
    audio: None = Field(None, description=NEUTRAL)
    annotations: Empty | None = Field(None, description=NEUTRAL)
    function_call: None = Field(None, description=NEUTRAL)

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("not the assistant's, who alone has tool_calls")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("to have a tool_call_id if its role is tool, and none otherwise")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template wants it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            found["tool_call_id"] = self.tool_call_id
            if self.name is not None:
                found["name"] = self.name
        return found


class Function(BaseModel):
    model_config = Strict
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_is_object_schema)] | None = Field(
        None, description="A JSON schema; none if left out."
    )
    strict: bool | None = Field(None, description="Kept to, whatever this says, where a call is required.")

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """A JSON schema."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(BaseModel):
    model_config = Strict
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """As a chat template wants it."""
        found = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.function.parameters,
        }
        return {"type": "function", "function": {key: value for key, value in found.items() if value is not None}}


class FunctionName(BaseModel):
    model_config = Strict
    name: Text


class NamedTool(BaseModel):
    model_config = Strict
    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
