"""`deltacome report`: results of benchmarks as one HTML page that needs nothing else."""

import datetime
import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from deltacome.benchmark.glance import KINDS, Panel, panels
from deltacome.benchmark.results import Table
from deltacome.errors import DeltacomeError
from deltacome.evaluate.comparison import cells
from deltacome.evaluate.summary import import_pyplot
from deltacome.files import disk_errors, write_atomically
from deltacome.progress import print_warning
from deltacome.version import __version__

LONG = 12  # rows; a longer table is folded
PNG = b"\x89PNG\r\n\x1a\n"
SHRINK = 2.6  # times at the most that a picture is made smaller; a screen that is narrower scrolls it


@dataclass(frozen=True)
class Stored:
    """What `results.save` writes, as far as the page shows it. title: that it has instead of one by its names."""

    benchmark: str
    command: str
    machine: str
    date: datetime.date
    tables: list[Table]
    title: str | None = None


@dataclass(frozen=True)
class Cells:
    """A table as text. is_number: of each column, whether it goes to the right."""

    title: str
    headings: list[str]
    is_number: list[bool]
    lines: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A result as the page has it. anchor: its name in links. width: the least of the picture, in pixels."""

    anchor: str
    title: str
    stored: Stored
    tables: list[Cells]
    picture: bytes | None
    width: int


def write_report(named: Sequence[Path], out: Path) -> int:
    """Write a page of results, in place of an older one; returns how many they are.

    named: files of results, or folders that have some at any depth, among whatever else.

    Raises:
        DeltacomeError: if a folder has none or a file is none, or on what the disk cannot do.
    """
    found = {file.resolve(): stored for path in named for file, stored in _find(path)}
    sections = [_section(f"result-{number}", *item) for number, item in enumerate(found.items(), 1)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda content: b64encode(content).decode()
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    page = template.render(
        sections=sections,
        dates=sorted({section.stored.date for section in sections}),
        glances=list(_glances(sections)),
        long=LONG,
        version=__version__,
    )
    with disk_errors(f"write {out}"):
        write_atomically(out, page.encode())
    return len(sections)


def _find(path: Path) -> list[tuple[Path, Stored]]:
    """The result that a file is, or those in a folder, sorted; what is hidden there may be half of one."""
    found = []
    with disk_errors(f"read {path}"):
        inside = sorted(filter(Path.is_file, path.rglob("*.json"))) if path.is_dir() else [path]
        for file in inside:
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            try:
                found.append((file, _parse(file.read_bytes())))
            except (ValueError, RecursionError) as error:
                if file == path:
                    raise DeltacomeError(f"{path} is no result of a benchmark: {error}") from error
    if not found:
        raise DeltacomeError(f"there is no result of a benchmark in {path}; deltacome benchmark leaves some")
    return found


def _parse(content: bytes) -> Stored:
    """The result in a file; others of JSON may lie beside it.

    Raises:
        ValueError: if it is none.
    """
    match json.loads(content):
        case {
            "benchmark": str(benchmark),
            "command": str(command),
            "machine": str(machine),
            "date": str(date),
            "tables": list(tables),
            **more,
        } if isinstance(title := more.get("title"), str | None):
            day = datetime.date.fromisoformat(date)
            return Stored(benchmark, command, machine, day, [_parse_table(table) for table in tables], title)
    raise ValueError("it has not the benchmark, command, machine, date and tables of one")


def _parse_table(found: Any) -> Table:
    match found:
        case {"title": str(title), "columns": dict(columns), "rows": list(rows)} if all(
            isinstance(heading, str) for heading in columns.values()
        ) and all(isinstance(row, dict) for row in rows):
            return Table(title, columns, rows)
    raise ValueError("it has a table without title, columns or rows")


def _section(anchor: str, path: Path, stored: Stored) -> Section:
    with disk_errors(f"read the picture of {path}"):
        picture = path.with_suffix(".png").read_bytes() if path.with_suffix(".png").is_file() else b""
    width = int.from_bytes(picture[16:20]) if picture.startswith(PNG) else 0
    try:
        tables = [_cells(table) for table in stored.tables]
    except (TypeError, ValueError) as error:
        raise DeltacomeError(f"{path} has a figure that is no number: {error}") from error
    title = stored.title or _title(path, stored)
    return Section(anchor, title, stored, tables, picture if width else None, round(width / SHRINK))


def _title(path: Path, stored: Stored) -> str:
    """The benchmark's name, and what the folder's name has beside it: `memory` in `h100-memory` is "Memory, h100"."""
    words, known = (re.split(r"[-_\s]+", name) for name in (path.parent.name, stored.benchmark))
    words = [word for word in words if word and word not in known]
    return stored.benchmark.capitalize() + (f", {' '.join(words)}" if words else "")


def _cells(table: Table) -> Cells:
    def is_number(key: str) -> bool:
        values = [row[key] for row in table.rows if row.get(key) is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)

    headings = [heading.strip() for heading in table.columns.values()]
    lines = [cells(row, table.columns) for row in table.rows]
    return Cells(table.title, headings, [is_number(key) for key in table.columns], lines)


def _glances(sections: list[Section]) -> Iterator[tuple[Section, Table, Panel]]:
    try:
        import_pyplot()
    except DeltacomeError as error:
        print_warning(f"the report has no pictures at a glance: {error}")
        return
    for kind in KINDS:
        for section in sections:
            for table, panel in panels(kind, section.stored.benchmark, section.stored.tables):
                yield section, table, panel
