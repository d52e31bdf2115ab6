"""What a benchmark leaves in its folder: its tables with the command, the machine and the day, and a picture."""

import hashlib
import io
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltacome.evaluate.comparison import markdown
from deltacome.evaluate.summary import import_pyplot
from deltacome.files import write_atomically
from deltacome.version import __version__

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of figures. columns: headings by the rows' keys."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The table, without its title."""
        return markdown(list(self.rows), dict(self.columns))


def save(
    out: Path, name: str, tables: Sequence[Table], figure: Any = None, *, device: str = "cpu", **more: Any
) -> dict[str, Any]:
    """Write `NAME.json`, `NAME.md` and, of a figure of matplotlib's, `NAME.png` to a folder; returns the first.

    device: that was measured. more: settings and whatever else the first is to have.
    """
    results = {
        "benchmark": name,
        "command": command(),
        "machine": machine(torch.device(device)),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **more,
        "tables": [asdict(table) for table in tables],
    }
    write_atomically(out / f"{name}.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    head = f"`{results['command']}`, {results['machine']}, {results['date']}\n"
    parts = "".join(f"\n## {table.title}\n\n{table.markdown()}" for table in tables)
    write_atomically(out / f"{name}.md", (head + parts).encode())
    if figure is not None:
        file = io.BytesIO()
        figure.savefig(file, dpi=130, format="png")
        import_pyplot().close(figure)
        write_atomically(out / f"{name}.png", file.getvalue())
    return results


def digest(content: Any) -> str:
    """Of what JSON can hold: all that stored figures depend on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored(path: Path, digest: str) -> Row | None:
    """What was stored under a digest, None if nothing was, or under another one."""
    if not path.is_file():
        return None
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
        return content if content.pop("digest") == digest else None
    except (ValueError, KeyError, AttributeError):
        return None


def store(path: Path, digest: str, content: Row) -> None:
    """Keep figures of a benchmark that is under way, under a digest of all that they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"digest": digest, **content}, indent=1, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def set_ticks(axis: Any) -> None:
    """Round numbers as people write them, also where a logarithmic axis has no power of ten."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 5 * low else ticker.MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: np.format_float_positional(value, 6, fractional=False, trim="-"))
    axis.set_minor_locator(ticker.NullLocator())


def command() -> str:
    """The running program's command line, as a person would type it."""
    program, *arguments = sys.argv
    name = Path(program).name
    own = name in ("deltacome", "__main__.py")
    return shlex.join(["deltacome", *arguments] if own else ["python", f"examples/{name}", *arguments])


def machine(device: torch.device) -> str:
    """The processor that computes, with what computes on it."""
    is_gpu = device.type == "cuda"
    parts = [torch.cuda.get_device_name(device)] if is_gpu else [_processor(), f"{torch.get_num_threads()} threads"]
    parts += [f"deltacome {__version__}", f"torch {torch.__version__}"]
    for package in ("transformers", "triton") if is_gpu else ("transformers",):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
