"""What the commands have in common: the application, their arguments, and how they print."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

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
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")]
Dtype = Literal["float32", "bfloat16", "float16"]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def split_name(item: str) -> tuple[str | None, str]:
    """Name and path in NAME=PATH, or None and the path if it has no name; there may be a = in the path."""
    name, equals, path = item.partition("=")
    return (name, path) if equals and "/" not in name and not Path(item).exists() else (None, item)


def named_folders(deltas: list[str], taken: Collection[str] = ()) -> dict[str, str]:
    """The deltas of the command line by name, which is the folder's if none is given.

    taken: names that something else has.
    """
    folders: dict[str, str] = {}
    for item in deltas:
        name, folder = split_name(item)
        if name is None:
            name = Path(item).resolve().name
        if not name or not folder or name in folders or name in taken:
            others = f" and none of {', '.join(taken)}" if taken else ""
            raise DeltacomeError(f"--delta {item}: write NAME=DELTA, each name once{others}")
        folders[name] = folder
    return folders


def print_table(columns: list[str], rows: list[list[str]], stderr: bool = False, less: tuple[str, ...] = ()) -> None:
    """Print rows of text under headings, the first column never broken, empty columns left out.

    less: headings that are left out, one after the other, as far as a terminal is too narrow; on one that still is,
    standard errors go on a second line. What is no terminal gets a table as wide as it needs.
    """
    from rich.console import Console

    console = Console(stderr=stderr)
    kept = [place for place in range(len(columns)) if place == 0 or not rows or any(row[place] for row in rows)]
    table, width = _table(columns, rows, kept)
    if not console.is_terminal:
        Console(stderr=stderr, width=width).print(table)
        return
    for heading in less:
        if width <= console.width:
            break
        kept = [place for place in kept if columns[place] != heading]
        table, width = _table(columns, rows, kept)
    if width > console.width:
        table, _ = _table(columns, [[cell.replace(" ± ", "\n± ") for cell in row] for row in rows], kept)
    console.print(table)


def _table(columns: list[str], rows: list[list[str]], kept: list[int]) -> tuple[Any, int]:
    """A table of some columns, and its width where no cell is broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place in kept:
        table.add_column(columns[place], justify="right" if place else "left", no_wrap=not place, overflow="fold")
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    return table, Console(width=10_000, height=100).measure(table).maximum


def quiet() -> None:
    """Keep transformers' own bars and notes out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
