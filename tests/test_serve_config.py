"""`deltacome serve --config`: options from a file, which the command line wins over."""

from pathlib import Path

import pytest
import typer.main

from commands import fail
from deltacome.cli.commands import app


def test_options_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('base = "BASE"\ndelta = ["a=A", "b=B"]\nmax-batch = 7\nmemory_limit = "1GB"\ndeadline = 5\n')
    command = typer.main.get_command(app).commands["serve"]
    found = command.make_context("serve", ["--config", str(file)]).params
    assert found["base"] == "BASE" and list(found["delta"]) == ["a=A", "b=B"] and found["max_batch"] == 7
    assert found["memory_limit"] == "1GB" and found["deadline"] == 5.0 and found["port"] == 8000
    words = ["OTHER", "--max-batch", "9", "--config", str(file), "--delta", "c=C"]
    found = command.make_context("serve", words).params
    assert found["base"] == "OTHER" and list(found["delta"]) == ["c=C"] and found["max_batch"] == 9
    file.write_text('delta = "a=A"\n')
    assert list(command.make_context("serve", ["BASE", "--config", str(file)]).params["delta"]) == ["a=A"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read the options in"),
        ("= 5", "cannot read the options in"),
        ("maximum = 5", "maximum is no option of deltacome serve"),
        ("config = 'x'", "config is no option of deltacome serve"),
        ("help = 1", "help is no option of deltacome serve"),
        ("port = true", "port must be a text or a number"),
        ("host = ['a']", "host must be a text or a number"),
        ("[delta]\na = 'b'", "delta must be a text or a number, or a list of them"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "serve.toml"
    if text is not None:
        file.write_text(text)
    fail(said, "serve", "BASE", "--config", file)
