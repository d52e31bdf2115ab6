"""docs/api-fields.md has every field of the two endpoints, says what the code does, and names tests that there are."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatStream
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Text
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextStream
from pydantic import BaseModel

from deltacome.serve.http.fields import NEUTRAL, UNUSED
from deltacome.serve.http.protocol import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/api-fields.md").read_text()
ENDPOINTS: dict[str, tuple[type[BaseModel], tuple[Any, ...]]] = {
    "Chat completions": (ChatRequest, (Chat, ChatStream)),
    "Completions": (CompletionRequest, (Text, TextStream)),
}
SOURCES = "\n".join(path.read_text() for path in ROOT.glob("tests/*.py"))
TESTS = set(re.findall(r"^def (test_\w+)", SOURCES, re.MULTILINE))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_is_in_the_table(endpoint: str) -> None:
    model, known = ENDPOINTS[endpoint]
    section = PAGE.partition(f"## {endpoint}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in section.splitlines() if line.startswith("| `")]
    said = {field: (what, tests) for fields, what, tests in rows for field in re.findall(r"`(\w+)`", fields)}
    of_openai = set().union(*(get_type_hints(params) for params in known))
    assert said.keys() == of_openai | model.model_fields.keys()
    assert len(said) == sum(len(re.findall(r"`(\w+)`", fields)) for fields, _, _ in rows)  # each once
    for name, (what, tests) in said.items():
        description = model.model_fields[name].description or ""
        assert what.startswith("refused") == (description == NEUTRAL), name
        assert (what == "taken and not used") == (description == UNUSED), name
        assert what.startswith("vLLM's") == (name not in of_openai), name
        assert set(re.findall(r"`(\w+)`", tests)) and set(re.findall(r"`(\w+)`", tests)) <= TESTS, name
