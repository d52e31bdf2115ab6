"""A client that is not ours: curl, as the documentation has it."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

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
