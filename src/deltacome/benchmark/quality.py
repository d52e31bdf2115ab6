"""Methods x ratios x fine-tunes: each cell compressed, measured and kept, so that a killed run goes on."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deltacome.benchmark import report, results
from deltacome.benchmark.suite import Candidate, Finetune, Suite, file_name, read_suite
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.compression.pipeline import compress
from deltacome.data import NO_TEMPLATE, read_examples
from deltacome.errors import DeltacomeError, UnreachableRatioError
from deltacome.evaluate.comparison import BASE, FINETUNED, Comparison, load_base, sizes
from deltacome.evaluate.summary import import_pyplot
from deltacome.files import disk_errors, sha256
from deltacome.outputs import work_folder
from deltacome.progress import print_warning
from deltacome.restore.merging import load_merged, open_checked
from deltacome.version import __version__

Row = dict[str, Any]


def quality(suite: str | Path, out: str | Path, *, limit: int | None = None) -> list[Row]:
    """Run what the folder `out` lacks of a suite; artifacts, rows, table and plot are kept there.

    Args:
        suite: file, see `docs/benchmark.md`.
        limit: how many of the first lines of each fine-tune's data are used.

    Returns:
        A row per cell, as `evaluate` has them, with `finetune`, the asked `ratio` and `compress_seconds`; or `failed`,
        the reason, in place of the figures.

    Raises:
        DeltacomeError: on a bad suite, before anything is run; on a full disk; if transformers cannot load a model.
    """
    plan, out = read_suite(suite), Path(out)
    base = Checkpoint(plan.base)
    benches = [_Bench(plan, finetune, base, limit, out) for finetune in plan.finetunes]

    def rows() -> list[Row]:
        return [bench.rows[cell.row] for bench in benches for cell in bench.cells if cell.row in bench.rows]

    with disk_errors(f"write {out}"), _alone(out):
        plot = _can_plot()
        for bench in benches:
            bench.look_up()
        if rows():
            print(f"{len(rows())} of {sum(len(b.cells) for b in benches)} cells are done already", file=sys.stderr)
        for bench in benches:
            for _ in bench.run():
                report.save(rows(), out, plot)
        report.save(rows(), out, plot)
    return rows()


@dataclass(frozen=True)
class _Cell:
    """One row of the table.

    row, artifact: its places on disk. digest, artifact_digest: of all that its figures and its artifact depend on.
    """

    name: str
    candidate: Candidate | None
    ratio: float | None
    row: Path
    artifact: Path
    digest: str
    artifact_digest: str

    def __str__(self) -> str:
        return report.title(self.name, self.ratio)


class _Bench:
    """One fine-tune of the suite. rows: those of its cells that are done, by their places."""

    def __init__(self, suite: Suite, finetune: Finetune, base: Checkpoint, limit: int | None, out: Path) -> None:
        self.suite, self.finetune, self.base, self.limit = suite, finetune, base, limit
        self.checkpoint = Checkpoint(finetune.model)
        pair(base, self.checkpoint)  # refuses another base's fine-tune
        self.others = [other.data for other in suite.finetunes if other is not finetune]
        self.cells = list(self._cells(out))
        self.rows: dict[Path, Row] = {}

    def _cells(self, out: Path) -> Iterator[_Cell]:
        """The base, the fine-tuned model, then every method, at every ratio where it spends a budget."""
        suite, finetune, template = self.suite, self.finetune, self.suite.chat_template
        if template not in (None, NO_TEMPLATE):
            template = sha256(Path(template))
        models = [__version__, _stamp(self.base), _stamp(self.checkpoint)]
        measured = {
            "data": [sha256(finetune.data), self.limit, *_images(finetune.data, self.limit)],
            "others": [[sha256(path) for path in self.others], suite.other_prompts],
            "offtask": sha256(suite.offtask) if suite.offtask else None,
            "asked": [finetune.name, finetune.new_tokens, finetune.pattern.pattern, template],
        }
        wanted: list[tuple[str, Candidate | None, float | None]] = [(BASE, None, None), (FINETUNED, None, None)]
        for one in suite.candidates:
            wanted += [(one.name, one, ratio) for ratio in (suite.ratios if one.spends_a_budget else [None])]
        for name, candidate, ratio in wanted:
            made: dict[str, Any] = {"models": models, "name": name, "ratio": ratio}
            if candidate is not None:
                made["options"] = candidate.options
                if candidate.calibrate and finetune.calibration is not None:
                    made["calibration"] = [sha256(finetune.calibration), template]
            place = Path(file_name(finetune.name), file_name(name), *([] if ratio is None else [f"{ratio:g}"]))
            row, artifact = out / "rows" / place, out / "artifacts" / place
            yield _Cell(
                name, candidate, ratio, _json(row), artifact, results.digest([made, measured]), results.digest(made)
            )

    def look_up(self) -> None:
        """Take up the rows that an earlier run has left and that still hold."""
        stored = ((cell.row, results.stored(cell.row, cell.digest)) for cell in self.cells)
        self.rows = {place: row for place, row in stored if row is not None}

    def run(self) -> Iterator[_Cell]:
        """Fill in the rows that are missing; yields each cell when it is done."""
        comparison = cache(self._compare)  # the reference is loaded when a cell needs it, and let go of at the end
        for number, cell in enumerate(self.cells, 1):
            if cell.row in self.rows:
                continue
            title = f"[{self.finetune.name} {number}/{len(self.cells)}] {cell}"
            print(title, file=sys.stderr)
            row: Row = {"finetune": self.finetune.name, "name": cell.name, "ratio": cell.ratio}
            try:
                if cell.candidate is not None:
                    row |= self._compress(cell, cell.candidate)
            except DeltacomeError as error:
                if isinstance(error.__cause__, OSError):  # a full disk, another process: not the cell's fault
                    raise
                row["failed"] = str(error)
                print(f"{title} failed: {error}", file=sys.stderr)
            else:
                row |= self._measure(cell, comparison())
                self._add_retention(cell, row, comparison())
            self._finish(cell, row)
            yield cell

    def _compress(self, cell: _Cell, candidate: Candidate) -> Row:
        """Make the cell's artifact if it is not there. The time is None where a kill has cut it in two."""
        record = _json(cell.artifact)
        made = results.stored(record, cell.artifact_digest)
        if made and cell.artifact.is_dir():
            return made
        interrupted = made == {}
        results.store(record, cell.artifact_digest, {})
        if cell.artifact.exists():
            shutil.rmtree(cell.artifact)
        try:
            outcome = compress(
                self.base.source,
                self.checkpoint.source,
                cell.artifact,
                ratio=cell.ratio,
                calibration=self.finetune.calibration if candidate.calibrate else None,
                chat_template=self.suite.chat_template,
                **candidate.options,
            )
        except DeltacomeError as error:
            record.unlink()
            if isinstance(error, UnreachableRatioError):  # nothing goes on from it
                shutil.rmtree(work_folder(cell.artifact), ignore_errors=True)
            raise
        made = {"compress_seconds": None if interrupted else outcome["seconds"]}
        results.store(record, cell.artifact_digest, made)
        return made

    def _measure(self, cell: _Cell, comparison: Comparison) -> Row:
        """The cell's figures against the fine-tuned model."""
        started = time.monotonic()
        row: Row = {}
        if cell.candidate is not None:
            artifact = open_checked(self.base, cell.artifact)
            row |= sizes(artifact)
            model, tokenizer = load_merged(self.base, artifact)
        elif cell.name == BASE:
            model, tokenizer = load_base(self.base, self.checkpoint)
        else:
            model, tokenizer = comparison.reference, comparison.tokenizer
        row |= comparison.measure(str(cell), model, tokenizer)
        return {**row, "seconds": round(time.monotonic() - started, 1)}

    def _add_retention(self, cell: _Cell, row: Row, comparison: Comparison) -> None:
        base, finetuned = self.cells[:2]
        known = {**self.rows, cell.row: row}
        if finetuned.row in known:
            low, high = known[base.row], known[finetuned.row]
            row |= comparison.retention(row, low, high)
            if cell is finetuned:  # only now can the base's own be told
                self._finish(base, low | comparison.retention(low, low, high))

    def _finish(self, cell: _Cell, row: Row) -> None:
        results.store(cell.row, cell.digest, row)
        self.rows[cell.row] = row

    def _compare(self) -> Comparison:
        suite, finetune = self.suite, self.finetune
        return Comparison(
            self.checkpoint,
            read_examples(finetune.data, self.limit),
            read_examples(suite.offtask) if suite.offtask else (),
            [example for path in self.others for example in read_examples(path, suite.other_prompts or self.limit)],
            new_tokens=finetune.new_tokens,
            chat_template=suite.chat_template,
            pattern=finetune.pattern,
            base=self.base,
        )


def _can_plot() -> bool:
    try:
        import_pyplot()
    except DeltacomeError as error:
        print_warning(f"no picture: {error}")
        return False
    return True


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder, locked."""
    out.mkdir(exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DeltacomeError(f"another process is writing {out}; wait for it or choose another folder") from error


def _stamp(checkpoint: Checkpoint) -> list[Any]:
    """What tells that a checkpoint is the one from before."""
    return [checkpoint.stamp(), [[path.name, sha256(path)] for path in checkpoint.sidecars()]]


def _images(data: Path, limit: int | None) -> list[str]:
    """Digests of the images of examples."""
    return [sha256(example.image) for example in read_examples(data, limit) if example.image is not None]


def _json(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
