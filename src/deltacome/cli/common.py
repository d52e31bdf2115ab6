"""What the commands have in common: the application, their arguments, and how they print."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deltacome.errors import DeltacomeError
from deltacome.version import __version__

app = typer.Typer(
    name="deltacome",
    help="Full fine-tunes of language models as compressed deltas on one base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Base = Annotated[str, typer.Argument(metavar="BASE", help="Base checkpoint: a folder or a hub id.")]
Finetuned = Annotated[str, typer.Argument(metavar="FINETUNED", help="Fine-tuned checkpoint: a folder or a hub id.")]
DeltaFolder = Annotated[str, typer.Argument(metavar="DELTA", help="Compressed delta: a folder or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none", help="Jinja chat template to use instead of the tokenizer's; 'none' for bare prompts."
    ),
]
Dtype = Literal["float32", "bfloat16", "float16"]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def named_folders(deltas: list[str]) -> dict[str, str]:
    """The deltas of the command line by name."""
    folders: dict[str, str] = {}
    for item in deltas:
        name, equals, folder = item.partition("=")
        if not equals:
            name, folder = Path(item).resolve().name, item
        if not name or name in folders:
            raise DeltacomeError(f"--delta {item}: write NAME=DELTA, each name once")
        folders[name] = folder
    return folders


def print_table(columns: list[str], rows: list[list[str]], stderr: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=stderr)
    console.print(table) if console.is_terminal else Console(stderr=stderr, width=160).print(table)


def quiet() -> None:
    """Keep transformers' own bars and notes out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
