"""Options of a command from a file."""

import tomllib
from pathlib import Path
from typing import Any

import typer

from deltacome.errors import DeltacomeError, reason


def from_file(context: typer.Context, option: typer.CallbackParam, file: Path | None) -> Path | None:
    """Take a command's options from a TOML file, where the command line has none; a callback of an eager option.

    Raises:
        DeltacomeError: if the file cannot be read, or names what is no option of the command.
    """
    if file is None:
        return None
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeltacomeError(f"cannot read the options in {file}: {reason(error)}") from error
    known = {parameter.name: parameter for parameter in context.command.params if parameter is not option}
    options: dict[str, Any] = {}
    for key, value in content.items():
        parameter = known.get(key.replace("-", "_"))
        if parameter is None or key == "help":
            raise DeltacomeError(f"{file}: {key} is no option of deltacome {context.command.name}")
        is_many = getattr(parameter, "multiple", False)
        values = value if is_many and isinstance(value, list) else [value]
        if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
            raise DeltacomeError(f"{file}: {key} must be a text or a number{', or a list of them' * is_many}")
        options[str(parameter.name)] = values if is_many else value
    context.default_map = options
    return file
