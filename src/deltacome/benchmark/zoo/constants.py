"""`benchmark constants`: other values of the default method's constants, chosen by all members but one."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from deltacome.benchmark import results
from deltacome.benchmark.zoo.members import MEMBERS
from deltacome.benchmark.zoo.trial import LIMIT, Trial, Weights, measured
from deltacome.compression.methods.rate_distortion import Decomposed, RateDistortion
from deltacome.errors import DeltacomeError
from deltacome.files import disk_errors
from deltacome.format.terms import add_terms
from deltacome.progress import bar

DEFAULT = RateDistortion()
RATIOS = (16.0, 64.0)
# What each constant could be besides.
OTHERS: dict[str, tuple[Any, ...]] = {
    "sensitivity_power": (0.0, 0.125, 0.375, 0.5),
    "drop_weight": (DEFAULT.drop_weight / 2, DEFAULT.drop_weight * 2),
    "bias_power": (0.15, 0.45),
    "flat_weight": (0.0, 5.0),
    "row_classes": ((0.0, 1.0), (0.0, 1 / 4, 1.0), (0.0, 1 / 16, 1 / 4, 1 / 2, 1.0)),
    "input_weight": (0.25, 0.75),  # the last ones, which the singular vectors depend on
}
FIGURES = ("on_task_kl", "off_task_kl")
Parts = dict[str, tuple[Any, list[Decomposed]]]  # of the matrices, each with the constant that it depends on


def benchmark_constants(
    out: str | Path,
    members: Sequence[str] = tuple(MEMBERS),
    *,
    constants: Sequence[str] = tuple(OTHERS),
    ratios: Sequence[float] = RATIOS,
    cache: str | Path | None = None,
    limit: int = LIMIT,
) -> list[results.Table]:
    """Measure the KL of every member with one constant after the other changed, and choose each by all other members.

    The deltas are approximated as artifacts of the ratio would, with nothing written.

    Args:
        out: folder for a file of rows a member, which a killed run goes on from, and for the tables.
        constants: names of those that are varied.
        cache: as of `benchmark_zoo`. limit: as of `Trial`.

    Returns:
        A table a constant, see `table`.

    Raises:
        DeltacomeError: on an unknown member or constant, a missing package or a full disk.
    """
    for name in constants:
        if name not in OTHERS:
            raise DeltacomeError(f"there is no constant {name!r}; there are {', '.join(OTHERS)}")
    settings = [{key: OTHERS[key] for key in constants}, list(ratios)]
    out = Path(out)
    rows = measured(out, members, cache, limit, settings, lambda trial: _rows(trial, constants, ratios))
    tables = [table(rows, constant) for constant in constants]
    with disk_errors(f"write {out}"):
        results.save(out, "constants", tables, limit=limit)
    return tables


def table(rows: Sequence[results.Row], constant: str) -> results.Table:
    """KL on-task / off-task in 10⁻³ by the value of a constant, and with the value that all other members choose.

    They choose the one with the least geometric mean, of both KLs at all ratios.
    """
    default = _text(getattr(DEFAULT, constant))
    cells: dict[tuple[str, float], dict[str, results.Row]] = {}
    for row in rows:
        if row["constant"] in (constant, None):
            value = default if row["constant"] is None else _text(row["value"])
            cells.setdefault((row["member"], row["ratio"]), {})[value] = row
    values = [default, *map(_text, OTHERS[constant])]
    members = {member for member, _ in cells}

    def mean(value: str, voters: set[str]) -> float:
        return _mean([cell[value] for (member, _), cell in cells.items() if member in voters])

    def choose(voters: set[str]) -> str:
        return min(values, key=lambda value: mean(value, voters))

    lines: list[results.Row] = []
    left_out = []
    for (member, ratio), cell in cells.items():
        line = {"member": member, "ratio": ratio, **{value: _kls(row) for value, row in cell.items()}}
        if len(members) > 1:
            chosen = choose(members - {member})
            left_out.append(cell[chosen])
            line |= {"chosen": chosen, "left_out": _kls(cell[chosen])}
        lines.append(line)
    last = {"member": "geometric mean", **{value: f"{1000 * mean(value, members):.3f}" for value in values}}
    if left_out:
        last |= {"chosen": choose(members), "left_out": f"{1000 * _mean(left_out):.3f}"}
    headings = {value: f"{value} (default)" if value == default else value for value in values}
    columns = {
        "member": "member",
        "ratio": "asked ratio",
        **headings,
        "chosen": "the others' choice",
        "left_out": "KL with it",
    }
    return results.Table(f"{constant}: KL in 10⁻³, on-task / off-task", columns, [*lines, last])


def _rows(trial: Trial, constants: Sequence[str], ratios: Sequence[float]) -> Iterator[results.Row]:
    """The figures of the default, then of each other value, at each ratio."""
    methods: list[tuple[str | None, Any, RateDistortion]] = [(None, None, DEFAULT)]
    methods += [(key, value, replace(DEFAULT, **{key: value})) for key in constants for value in OTHERS[key]]
    parts: Parts = {}
    wanted = list(product(methods, ratios))
    found = trial.measure(approximate(trial, method, ratio, parts) for (_, _, method), ratio in wanted)
    with bar(f"varying constants on {trial.finetuned.folder.name}", len(wanted)) as advance:
        for ((constant, value, _), ratio), figures in zip(wanted, found, strict=True):
            yield {"constant": constant, "value": value, "ratio": ratio, **figures}
            advance(1)


def approximate(trial: Trial, method: RateDistortion, ratio: float, parts: Parts) -> Weights:
    """The parameters with deltas as an artifact has them. parts: what is decomposed by now."""
    matrices = dict(trial.at(ratio))
    spectra = {}
    for name, delta in matrices.items():
        constant = method.row_classes if delta.is_embedding else method.input_weight
        if name not in parts or parts[name][0] != constant:
            parts[name] = constant, method.decompose(delta)
        spectra[name] = [method.spectrum(delta, part.block, part.s) for part in parts[name][1]]
    budget, entries = trial.budget(method, ratio)
    shares = budget.share_out(entries, spectra)
    approximations = {}
    for name, delta in matrices.items():
        terms = method.quantize(delta, parts[name][1], shares[name])
        approximations[name] = add_terms(torch.zeros_like(delta.values), terms)
    return trial.weights(approximations)


def _mean(rows: Sequence[results.Row]) -> float:
    """The geometric mean of the KLs."""
    return statistics.geometric_mean(row[figure] for row in rows for figure in FIGURES)


def _kls(row: results.Row) -> str:
    return " / ".join(f"{1000 * row[figure]:.3f}" for figure in FIGURES)


def _text(value: Any) -> str:
    return ", ".join(f"{x:g}" for x in value) if isinstance(value, tuple | list) else f"{value:.3g}"
