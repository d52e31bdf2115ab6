"""Kinds of fields of requests."""

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Strict = ConfigDict(extra="forbid", allow_inf_nan=False)

# Fields of OpenAI's that change nothing here, and those of which only the values that change nothing are taken.
UNUSED = "Taken and not used."
NEUTRAL = "Not supported: leave it out, or send what changes nothing."
Empty = Annotated[list[Any], Field(max_length=0)]
UnusedText = Annotated[Text | None, Field(description=UNUSED)]
