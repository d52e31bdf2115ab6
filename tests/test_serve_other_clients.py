"""Clients that are not ours: curl, as the documentation has it, and LangChain."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltacome.serve.server import build
from serving import serving
from test_serve_tools import TEMPLATES

pytest_plugins = ["serving"]

PAGE = (Path(__file__).parents[1] / "docs/serve.md").read_text()
CURL = re.findall(r"^```\n(curl .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tool_address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with the names of the documentation, whose chat template has a place for tools."""
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATES["hermes"])
    deltas = {"math": folder / "deltas/a", "intent": folder / "deltas/b"}
    with serving(build(folder / "base", deltas, chat_template=str(template))) as address:
        yield address


def test_there_are_examples_with_curl() -> None:
    assert len(CURL) >= 2


@pytest.mark.parametrize("command", CURL)
def test_curl(tool_address: str, command: str) -> None:
    command = command.replace("http://127.0.0.1:8000", tool_address).replace(
        "curl", "curl --silent --fail-with-body", 1
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    choice = json.loads(result.stdout)["choices"][0]
    if "tools" in command:
        calls = choice["message"]["tool_calls"]
        assert calls[0]["function"]["name"] == "add" and calls[0]["function"]["arguments"].startswith("{")
    else:
        assert choice["message"]["content"].startswith("{")


def test_langchain(tool_address: str) -> None:
    """Messages, streams, structured output and tools by LangChain's own means."""
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai, and run it again")
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_core.tools import tool

    chat = langchain.ChatOpenAI(
        base_url=f"{tool_address}/v1", api_key="none", model="math", temperature=0, max_tokens=200
    )
    answer = chat.invoke("Hello")
    assert isinstance(answer, AIMessage) and answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == answer.content

    schema: dict[str, Any] = {
        "title": "Verdict",
        "type": "object",
        "properties": {"right": {"type": "boolean"}},
        "required": ["right"],
        "additionalProperties": False,
    }
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(schema, method=method).invoke("Is it?")
        assert isinstance(found["right"], bool), method

    @tool
    def pick(which: bool) -> str:
        """Pick one."""
        return f"{which}!"

    with_tools = chat.bind_tools([pick], tool_choice="pick", parallel_tool_calls=False)
    asked = with_tools.invoke("Pick one.")
    (call,) = asked.tool_calls
    assert call["name"] == "pick" and isinstance(call["args"]["which"], bool)
    said = ToolMessage(pick.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([pick]).invoke([HumanMessage("Pick one."), asked, said]).usage_metadata["input_tokens"] > 0
