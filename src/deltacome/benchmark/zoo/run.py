"""`benchmark zoo`: the suites of `benchmark quality` over the zoo, one a base, and all of their rows in one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltacome.benchmark import report, results
from deltacome.benchmark.quality import Row, quality
from deltacome.benchmark.zoo.cache import checkpoints, offtask
from deltacome.benchmark.zoo.members import MEMBERS
from deltacome.files import disk_errors, write_atomically

METHODS = {name: {"method": name} for name in ("rate-distortion", "delta-come")}
RATIOS = (16.0, 32.0, 64.0)
OTHER_PROMPTS = 4  # of each other member
COLUMNS = {"finetune": "member", **report.COLUMNS}


def benchmark_zoo(
    out: str | Path,
    members: Sequence[str] = tuple(MEMBERS),
    *,
    ratios: Sequence[float] = RATIOS,
    cache: str | Path | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Make what is missing of the zoo, compress its members by two methods, and measure them.

    Args:
        out: folder for what `quality` leaves, a folder a suite, and the table over all; gone on with.
        members: names of those that are wanted.
        cache: folder of the checkpoints, by default `deltacome/zoo` among the user's cached files.
        limit: how many of each member's held-out examples, and at most how many off-task texts, are used.

    Returns:
        The rows of `quality`.

    Raises:
        DeltacomeError: on an unknown member, a missing package or a full disk.
    """
    cache, _ = checkpoints(members, cache)
    out = Path(out)
    with disk_errors(f"write {cache}"):
        suites = _suites(members, list(ratios), cache.absolute(), limit)
    rows: list[Row] = []
    with disk_errors(f"write {out}"):
        out.mkdir(exist_ok=True)
        for name, suite in suites.items():
            path = out / f"{name}.json"
            write_atomically(path, (json.dumps(suite, indent=1) + "\n").encode())
            rows += quality(path, out / name, limit=limit)
            results.save(out, "zoo", [table(rows)])
    return rows


def table(rows: Sequence[Row]) -> results.Table:
    """All figures in one table."""
    columns = COLUMNS | ({"failed": "failed"} if any("failed" in row for row in rows) else {})
    return results.Table("zoo", columns, [{key: row[key] for key in report.CSV_COLUMNS if key in row} for row in rows])


def _suites(names: Sequence[str], ratios: list[float], cache: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """A suite a base, by name; those with images have one of their own, for no other model can read their prompts."""
    suites: dict[str, dict[str, Any]] = {}
    for name in names:
        member = MEMBERS[name]
        suite = suites.setdefault(
            name if member.images else member.base,
            {
                "base": str(cache / member.base),
                "offtask": str(offtask(cache, limit)),
                "other_prompts": OTHER_PROMPTS,
                "finetunes": {},
                "methods": METHODS,
                "ratios": ratios,
            },
        )
        suite["finetunes"][name] = {
            "model": str(cache / name),
            "data": str(cache / name / "data" / "test.jsonl"),
            "calibration": str(cache / name / "data" / "train.jsonl"),
            "new_tokens": member.new_tokens,
            **({"answer_pattern": member.pattern} if member.pattern else {}),
        }
    return suites
