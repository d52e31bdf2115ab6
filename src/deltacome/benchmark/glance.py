"""The pictures that a report begins with: KL against bytes, memory and time against tenants."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from deltacome.benchmark.results import Row, Table, set_ticks
from deltacome.evaluate.summary import import_pyplot

MARKERS, DASHES = "os^DvP*X", ("-", "--", ":", "-.")  # of other numbers than the colors, so that pairs differ
WIDTH = 44  # letters of a line of the legend
TICKS = 8  # the most numbers of tenants that all have a tick
MERGED, SHARED = "merged models", "one base with deltas"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Kind:
    """One kind of picture. lines: labels by the keys of rows; none where a line is what has the same `name`."""

    heading: str
    x: str
    y: str
    x_label: str
    y_label: str
    lines: dict[str, str] | None = None
    benchmark: str | None = None
    scale: float = 1


KINDS = (
    Kind("Quality against bytes", "bytes", "on_task_kl", "artifact, MB", "KL on the task, nats a token", scale=1e-6),
    Kind(
        "Memory against tenants",
        *("tenants", "gigabytes", "tenants", "memory, GB"),
        lines={"gigabytes": SHARED, "merged_gigabytes": MERGED},
        benchmark="memory",
    ),
    Kind(
        "Time against tenants",
        *("tenants", "tenants_ms", "tenants, one row each", "a decoding step of them all, ms"),
        lines={"tenants_ms": SHARED, "turns_ms": f"{MERGED} in turn", "base_ms": "the base alone"},
        benchmark="runtime",
    ),
)


@dataclass(frozen=True)
class Panel:
    """A picture, as SVG, with what it shows in words."""

    heading: str
    text: str
    svg: bytes


def panels(kind: Kind, benchmark: str, tables: Iterable[Table]) -> Iterator[tuple[Table, Panel]]:
    """A picture of that kind for each table that has something for it.

    Raises:
        DeltacomeError: if matplotlib is missing.
    """
    for table in tables if kind.benchmark in (None, benchmark) else ():
        lines = {label: points for label, points in _lines(kind, table.rows).items() if points}
        if any(_is_positive(row.get(kind.x)) and _is_positive(row.get(kind.y)) for row in table.rows):
            yield table, Panel(kind.heading, _words(kind, lines), _draw(kind, lines))


def _lines(kind: Kind, rows: Sequence[Row]) -> dict[str, Points]:
    def points(own: Iterable[Row], key: str) -> Points:
        found = [row for row in own if _is_positive(row.get(kind.x)) and _is_positive(row.get(key))]
        return sorted((row[kind.x] * kind.scale, row[key]) for row in found)

    if kind.lines is not None:
        return {label: points(rows, key) for key, label in kind.lines.items()}
    names = dict.fromkeys(str(row.get("name")) for row in rows)
    return {name: points((row for row in rows if str(row.get("name")) == name), kind.y) for name in names}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _words(kind: Kind, lines: dict[str, Points]) -> str:
    """Where every line ends; of sizes, which is the least KL."""
    if kind.lines is None:
        name, (x, y) = min(((name, point) for name, points in lines.items() for point in points), key=lambda p: p[1][1])
        return f"Down and to the left is better. The least KL is {y:.5f}: {name}, {_short(x)} MB."
    unit = kind.y_label.rpartition(", ")[2]
    most = max(x for points in lines.values() for x, _ in points)
    ends = ", ".join(
        f"{label} {_short(points[-1][1])} {unit}" for label, points in lines.items() if points[-1][0] == most
    )
    return f"{most:g} tenants: {ends}."


def _short(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}"


def _draw(kind: Kind, lines: dict[str, Points]) -> bytes:
    pyplot = import_pyplot()
    # A name is no formula; the same figures give the same bytes.
    with pyplot.rc_context({"text.parse_math": False, "svg.hashsalt": "deltacome"}):
        columns = 2 if len(lines) > 5 and max(map(len, lines)) < WIDTH / 2 else 1
        size = (4.3, 3.3 + 0.2 * math.ceil(len(lines) / columns))
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        for place, (label, points) in enumerate(lines.items()):
            style = {"marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[place % len(DASHES)], "markersize": 5}
            (line,) = axes.plot(*zip(*points, strict=True), label=fill(label, WIDTH), **style)
            line.set_markerfacecolor((line.get_color(), 0.4))  # what lies under it is seen
        axes.set(xscale="log", yscale="log", xlabel=kind.x_label, ylabel=kind.y_label)
        for axis in (axes.xaxis, axes.yaxis):
            set_ticks(axis)
        places = sorted({x for points in lines.values() for x, _ in points})
        if kind.x == "tenants" and len(places) <= TICKS:
            axes.set_xticks(places)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)  # hides no data
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return file.getvalue()
