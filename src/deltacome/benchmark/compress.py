"""How long compression takes, phase by phase, and how much memory: runs of the command in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deltacome.benchmark.random_checkpoints import write_pair
from deltacome.benchmark.results import Row, Table, save
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.device import choose_device
from deltacome.errors import DeltacomeError
from deltacome.outputs import new_folder
from deltacome.progress import bar

COLUMNS = {"phase": "phase", "seconds": "s", "share": "share"}


def benchmark_compress(
    out: Path,
    *,
    base: str | None = None,
    finetuned: str | None = None,
    shape: str | None = None,
    layers: int | None = None,
    ratio: str = "16",
    device: str | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """Compress without data, several times, and write `compress.json` and `compress.md` to a new folder.

    Seconds are those of the round in the middle, without the interpreter's start and imports before the work; memory is
    the most of all rounds, above that at the start and without a GPU's.

    Args:
        base, finetuned: the checkpoints; else random ones of a `shape` of `random_model.SHAPES`, of which only so many
            `layers`, beside embedding and head.
        ratio: as the command line has it.

    Raises:
        DeltacomeError: if a run fails or takes more memory than 4 times the largest matrix in float32 and a GiB, which
            is found out when the files are there; if there is nothing to compress, or the folder exists.
    """
    if (base is None or finetuned is None) == (shape is None):
        raise DeltacomeError("give either BASE and FINETUNED, or --shape")
    place = choose_device(device)
    with new_folder(out) as folder:
        with TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary)
            if shape is not None:
                base, finetuned = map(str, write_pair(made, shape, layers))
            assert base is not None and finetuned is not None
            reports = []
            with bar("benchmark", rounds) as advance:
                for number in range(rounds):
                    reports.append(_run(base, finetuned, made / str(number), ratio, place))
                    advance(1)
            pairs = pair(Checkpoint(base), Checkpoint(finetuned))
        bound = 4 * max(4 * torch.Size(p.shape).numel() for p in pairs) + 2**30
        peak = max(report["peak_bytes"] for report in reports)
        seconds = sorted(report["seconds"] for report in reports)
        title = (
            f"{shape or Path(str(finetuned)).name}{f', {layers} of its layers' if layers else ''}, ratio {ratio}: "
            f"{seconds[0]:.1f} to {seconds[-1]:.1f} s; peak memory {peak / 2**30:.2f} GiB, bound {bound / 2**30:.2f}"
        )
        middle = next(report for report in reports if report["seconds"] == seconds[len(seconds) // 2])
        results = save(folder, "compress", [Table(title, COLUMNS, _rows(middle))], device=str(place), reports=reports)
    if peak > bound:
        raise DeltacomeError(f"{title}: more than 4 times the largest matrix and a GiB")
    return results


def _run(base: str, finetuned: str, out: Path, ratio: str, place: torch.device) -> Row:
    command = [sys.executable, "-m", "deltacome.cli", "compress", base, finetuned, "-o", str(out), "--ratio", ratio]
    done = subprocess.run([*command, "--device", str(place), "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise DeltacomeError("a compression has failed, as it says above; mend that and start again")
    report: Row = json.loads(done.stdout)
    return report


def _rows(report: Row) -> list[Row]:
    total = report["seconds"]
    phases = {**report["phases"], "the rest": total - sum(report["phases"].values()), "all": total}
    return [
        {"phase": phase, "seconds": round(seconds, 1), "share": round(seconds / total, 2)}
        for phase, seconds in phases.items()
    ]
