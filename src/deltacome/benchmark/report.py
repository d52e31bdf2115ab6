"""The rows of `benchmark quality` as CSV, as tables and as a picture of KL against bytes."""

import csv
import io
from pathlib import Path
from typing import Any

from deltacome.benchmark import results
from deltacome.evaluate.comparison import BASE
from deltacome.evaluate.summary import import_pyplot
from deltacome.files import write_atomically

FIGURES = ("on_task_kl", "off_task_kl", "other_kl", "nll", "accuracy", "retention")
CSV_COLUMNS = (
    *("finetune", "name", "method", "ratio", "bytes", "artifact_ratio", "linear_ratio", "compress_seconds"),
    *(key for figure in FIGURES for key in (figure, f"{figure}_error")),
    *("seconds", "failed"),
)
COLUMNS = {
    "name": "model",
    "ratio": "asked ratio",
    "bytes": "bytes",
    "artifact_ratio": "artifact ratio",
    "linear_ratio": "linear ratio",
    "on_task_kl": "on-task KL",
    "off_task_kl": "off-task KL",
    "other_kl": "other KL",
    "nll": "NLL",
    "accuracy": "accuracy",
    "retention": "retention",
    "compress_seconds": "compress seconds",
}
PANELS = {"on_task_kl": "on the task", "off_task_kl": "off the task", "other_kl": "on other tasks' prompts"}
STYLES = ("o-", "s--", "^:", "D-.")

Row = dict[str, Any]


def save(rows: list[Row], folder: Path, plot: bool) -> None:
    """Write `quality.csv`, and what `results.save` does, the picture where there is a cell to plot."""
    write_atomically(folder / "quality.csv", _csv(rows).encode())
    picture = figure(rows) if plot and any("on_task_kl" in row and "bytes" in row for row in rows) else None
    results.save(folder, "quality", [_table(name, own) for name, own in by_finetune(rows).items()], picture)


def _table(name: str, rows: list[Row]) -> results.Table:
    columns = COLUMNS | ({"failed": "failed"} if failures(rows) else {})
    return results.Table(name, columns, [{key: row[key] for key in CSV_COLUMNS if key in row} for row in rows])


def by_finetune(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each fine-tune."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["finetune"], []).append(row)
    return groups


def title(name: str, ratio: float | None) -> str:
    """What a cell is called."""
    return name if ratio is None else f"{name}, ratio {ratio:g}"


def failures(rows: list[Row]) -> list[str]:
    """A line for each cell that has no figures."""
    return [f"{title(row['name'], row['ratio'])}: {row['failed']}" for row in rows if "failed" in row]


def _csv(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def figure(rows: list[Row]) -> Any:
    """A row of panels a fine-tune, a panel for each KL that was measured, a line a method; the base's KL dotted.

    Raises:
        DeltacomeError: if matplotlib is missing.
    """
    pyplot = import_pyplot()
    groups = by_finetune(rows)
    panels = {key: heading for key, heading in PANELS.items() if any(key in row for row in rows)}
    size = (4.6 * len(panels) + 1.6, 3.6 * len(groups) + 0.4)
    drawn, grid = pyplot.subplots(len(groups), len(panels), figsize=size, layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["name"] for row in rows if "bytes" in row))
    for (finetune, own), line in zip(groups.items(), grid, strict=True):
        for (key, heading), axes in zip(panels.items(), line, strict=True):
            measured = [row for row in own if key in row]
            for row in measured:
                if row["name"] == BASE:
                    axes.axhline(row[key], color="0.4", linestyle=":", label=BASE)
            for place, name in enumerate(names):
                points = sorted(
                    (row["bytes"] / 1e6, row[key], row[f"{key}_error"]) for row in measured if row["name"] == name
                )
                if points:
                    x, y, error = zip(*points, strict=True)
                    style = {"color": f"C{place % 10}", "markersize": 5, "capsize": 3, "label": name}
                    axes.errorbar(x, y, error, fmt=STYLES[place % len(STYLES)], **style)
            axes.set(xscale="log", yscale="log", xlabel="artifact, MB", ylabel="KL, nats a token")
            for axis in (axes.xaxis, axes.yaxis):
                results.set_ticks(axis)
            axes.set_title(f"{finetune}: {heading}")
            axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
    return drawn
