"""The pipeline: pair the checkpoints, share out the bytes, compress every weight, write the artifact."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deltacome.checkpoints.adapter import Adapted
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.folding import Folded
from deltacome.checkpoints.pairing import Pair, pair
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.checkpoints.rescaling import Rescaled, rescaled
from deltacome.compression.allocation import Spectrum
from deltacome.compression.budget import DEFAULT_RATIO, Budget, check_ratio
from deltacome.compression.calibration import CalibrationStream
from deltacome.compression.executors import Executor, ExecutorName, make_executor
from deltacome.compression.journal import Journal, Store
from deltacome.compression.matrices import Matrices, count_layers
from deltacome.compression.measuring import measure_inputs, measure_spectra
from deltacome.compression.methods import DEFAULT_METHOD, CodesBits, SharesByError, describe, make_method
from deltacome.compression.opening import (
    Tokens,
    Warn,
    check_child,
    check_rows,
    check_statistics,
    open_finetuned,
    open_parent,
    read_tokens,
    warn_of_odd_change,
)
from deltacome.compression.writing import check_names, write_artifact
from deltacome.device import choose_device
from deltacome.errors import BadInputError, DeltacomeError
from deltacome.files import disk_errors, raw
from deltacome.format.artifact import Artifact
from deltacome.format.terms import Dense
from deltacome.memory import peak_memory
from deltacome.outputs import WorkFolder, refuse_existing
from deltacome.progress import bar, print_warning
from deltacome.version import __version__

Phases = dict[str, float]  # seconds


def compress(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    ratio: float | Sequence[float] | None = None,
    method: str | None = None,
    embeddings: Literal["compress", "exact"] = "compress",
    calibration: str | Path | None = None,
    calibration_examples: int = 128,
    chat_template: str | None = None,
    fold_norms: bool = False,
    renames: Mapping[str, str] | None = None,
    parent: str | Path | None = None,
    engine: ExecutorName = "local",
    device: str | torch.device | None = None,
    warn: Warn = print_warning,
    **settings: Any,
) -> dict[str, Any]:
    """Compress the delta between two checkpoints into the folder `out`.

    Args:
        base, finetuned: checkpoint folders or hub ids; `finetuned` may be a folder with a LoRA adapter of the base, or
            with a delta of it.
        ratio: bytes of the fine-tuned weights in 16 bit over those of the artifact, 16 by default. A method or
            precision plan that fixes its own size must reach it, if it is given. Of several, each gets an artifact in
            the folder `out`, which has its ratio for a name; what they have in common is computed once.
        method: one of `deltacome.compression.methods.METHODS`; by default `delta-come` for a precision plan, else the
            first.
        embeddings: `exact` keeps changed embeddings and the head as they are and leaves them out of the ratio's sum.
        calibration: JSONL file of examples (see `deltacome.data.read_examples`). Without it no data is used; methods
            that weigh inputs measure them on random tokens.
        calibration_examples: how many of the file's first lines are used.
        chat_template: Jinja file, or `none`, in place of the tokenizer's own template.
        fold_norms: put what changed in a norm into the layers behind it, where that is exact; see
            `deltacome.checkpoints.folding.Folded`.
        renames: beginnings of the fine-tuned weights' names and the base's for them, if they differ.
        parent: a delta of the base, a folder beside `out` or a hub id: the new one is made on what that rebuilds, holds
            what has changed since, and is used together with it. Names in `renames` are then the parent's.
        engine: where the work on matrices is done, see `deltacome.compression.executors`.
        device: what it is done on, `cpu` or `cuda`; by default a GPU if there is one.
        warn: called with each warning.
        settings: the method's own; None keeps its default.

    Returns:
        Sizes in bytes, `artifact_ratio`, `linear_ratio`, `seconds`, those of each phase (`phases`), and `peak_bytes` of
        memory above that at the call. For several ratios the sizes and ratios of each are in a list, `artifacts`.

    Raises:
        DeltacomeError: on any bad input; nothing is left behind then. After anything else that ends it early, a kill, a
            full disk, a lost worker, the same call goes on where it stopped.
    """
    started, out = time.monotonic(), Path(out)
    refuse_existing(out)
    ratios = sorted(set(ratio)) if isinstance(ratio, Sequence) else [ratio]
    for each in ratios:
        if each is not None:
            check_ratio(each)
    method = method or (DEFAULT_METHOD if settings.get("precision") is None else "delta-come")
    chosen = make_method(method, **settings)
    if isinstance(chosen, CodesBits) and fold_norms:
        raise DeltacomeError(f"folding norms rounds weights, which method {method} does not; leave out --fold-norms")
    if isinstance(ratio, Sequence) and not (ratios and chosen.spends_a_budget):
        raise DeltacomeError(f"method {method} fixes the size by itself; give it one ratio, or none")
    check_statistics(method, chosen, calibration is not None, engine)
    if parent is not None:
        if isinstance(ratio, Sequence):
            raise DeltacomeError("a delta lies beside its parent, several would lie in a folder; give one ratio")
        check_child(method, chosen, fold_norms)
    phases: Phases = {}
    with peak_memory() as peak:
        opened, exact = Checkpoint(base), embeddings == "exact"
        before = opened if parent is None else open_parent(opened, parent, out)
        tuned = open_finetuned(opened, finetuned, exact, fold_norms, renames)
        if isinstance(tuned, Adapted):
            renames = None  # its names are the base's by now
        if method == DEFAULT_METHOD and type(tuned) is Checkpoint and not exact:
            tuned = rescaled(before, tuned, pair(before, tuned, renames))
        pairs = {p.name: p for p in pair(before, tuned, renames)}
        if parent is not None:
            check_rows(before, tuned, pairs)
        budgets = [Budget(chosen, pairs, each, exact) for each in ratios]
        run = _Run(before, tuned, budgets[0], budgets[-1], make_executor(engine), choose_device(device), warn, phases)
        tokens = None
        if calibration is not None:
            tokens = read_tokens(opened, tuned, calibration, calibration_examples, chat_template)
        check_names(before, tuned)
        if not isinstance(chosen, CodesBits):
            warn_of_odd_change(before, tuned, budgets[0], warn)
        recorded = {**describe(method, chosen), "calibration_examples": len(tokens[0]) if tokens else 0}
        if isinstance(tuned, Folded):
            recorded["folded_norms"] = len(tuned.norms)
        if isinstance(tuned, Rescaled):
            recorded["rescaled"] = tuned.factor
        with disk_errors(f"write {out}"):
            if isinstance(ratio, Sequence):
                _make_all(run, budgets, out, recorded, tokens)
            else:
                _make(run, out, recorded, tokens)
    costs = {
        "seconds": round(time.monotonic() - started, 2),
        "phases": {phase: round(seconds, 2) for phase, seconds in phases.items()},
        "peak_bytes": peak.bytes,
    }
    if isinstance(ratio, Sequence):
        return {"artifacts": [_sizes(_place(out, budget)) for budget in budgets], **costs}
    return _sizes(out) | costs


def _sizes(out: Path) -> dict[str, Any]:
    """What the report says of an artifact."""
    artifact = Artifact(out)
    return {
        "artifact": str(out),
        "method": artifact.method,
        "artifact_bytes": artifact.bytes,
        "finetuned_bytes": artifact.finetuned_bytes,
        "artifact_ratio": round(artifact.ratio, 3),
        "linear_ratio": artifact.manifest["linear_ratio"],
    }


def flatten(
    base: str | Path, delta: str | Path, out: str | Path, *, ratio: float | None = None, warn: Warn = print_warning
) -> dict[str, Any]:
    """Compress what a delta on a delta rebuilds into the folder `out`: a delta of the same model that has no parent.

    Args:
        base: checkpoint folder or hub id.
        delta: folder or hub id of the delta.
        ratio, warn: as of `compress`, by whose default method it is done.

    Returns:
        As `compress`.

    Raises:
        DeltacomeError: as `compress`, and if the delta has no parent.
    """
    artifact = Artifact(delta)
    if artifact.parent is None:
        raise DeltacomeError(f"{delta} has no parent: there is nothing to flatten")
    return compress(base, artifact.folder, out, ratio=ratio, warn=warn)


@dataclass(frozen=True)
class _Run:
    """What one compression reads, what it may spend, where the work on matrices is done, and who hears of doubts.

    last_budget: the least of those that the same run is to keep to, one after the other. phases: get the seconds that
    each takes. shared: where the matrices' bases are put, if not with the finished ones.
    """

    base: Checkpoint
    finetuned: Checkpoint
    budget: Budget
    last_budget: Budget
    executor: Executor
    device: torch.device
    warn: Warn
    phases: Phases
    shared: Store | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds among those of a phase."""
        started = time.monotonic()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - started


def _make_all(run: _Run, budgets: Sequence[Budget], out: Path, method: dict[str, Any], tokens: Tokens | None) -> None:
    """Compress to each of some budgets, in a folder in the folder `out`, going on from what a killed run has left."""
    work = WorkFolder(out, {**_job(run, method, tokens), "ratio": [budget.ratio for budget in budgets]})
    folder, shared = work.path / "output", Store(work.path / "shared")
    with work.until_over():
        for path in (folder, shared.folder):
            path.mkdir(exist_ok=True)
        for path in shared.folder.glob("*.partial"):  # a killed process was at it
            path.unlink()
        for budget in budgets:
            if not _place(folder, budget).exists():
                _make(replace(run, budget=budget, shared=shared), _place(folder, budget), method, tokens)
        for path in folder.glob(".*"):  # of a run that was killed when its artifact was there
            shutil.rmtree(path)
        work.publish(folder)


def _place(out: Path, budget: Budget) -> Path:
    """The artifact's folder of one of several budgets."""
    return out / f"{budget.ratio:g}"


def _job(run: _Run, method: dict[str, Any], tokens: Tokens | None) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        "deltacome": __version__,
        "checkpoints": [run.base.stamp(), run.finetuned.stamp()],
        "method": method,
        "ratio": run.budget.ratio,
        "exact": sorted(run.budget.uncounted),
        "base names": [p.base_name for p in run.budget.pairs.values()],
        "calibration": hashlib.sha256(raw(tokens[0])).hexdigest() if tokens else None,
    }


def _make(run: _Run, out: Path, method: dict[str, Any], tokens: Tokens | None) -> None:
    """Compress into the folder `out`, going on from what a killed run of the same job has left."""
    job = _job(run, method, tokens)
    journal = Journal(out, job)
    is_over = False
    try:
        try:
            _compress_weights(run, journal, tokens)
        except BadInputError:
            is_over = True
            raise
        if [run.base.stamp(), run.finetuned.stamp()] != job["checkpoints"]:
            raise DeltacomeError(f"{run.base.source} or {run.finetuned.source} has changed meanwhile; start again")
        with run.phase("writing"):
            write_artifact(journal, run.base, run.finetuned, method, run.budget.check)
        is_over = True
    finally:
        journal.work.close(remove=is_over)


def _compress_weights(run: _Run, journal: Journal, tokens: Tokens | None) -> None:
    """Compress every weight that the journal lacks."""
    budget, method = run.budget, run.budget.method
    if journal.entries:
        run.warn(f"going on with the interrupted run: {len(journal.entries)} of {len(budget.pairs)} weights are done")
    # Opened first: an architecture that cannot be calibrated is found out before the work.
    stream = CalibrationStream(run.finetuned, *tokens, run.device) if tokens else None
    layers = count_layers(p.name for p in budget.matrices)
    bits = 16 / (budget.ratio or DEFAULT_RATIO)
    shared = run.shared or journal.store
    is_last = budget is run.last_budget
    work = Matrices(
        run.base, run.finetuned, method, journal.store, budget.pairs, layers, bits, shared, is_last, run.device
    )
    matrices = {p.name for p in budget.matrices}
    with run.phase("exact weights"):
        for name in budget.pairs.keys() - matrices - journal.entries.keys():
            _store_exact(work, budget.pairs[name])
            journal.add(name)
    run.last_budget.check_reachable(journal.entries)
    if method.statistics == "energies":
        with run.phase("inputs"):
            inputs, sensitivities = measure_inputs(run.finetuned, budget.matrices, stream, shared, run.warn, run.device)
        work = replace(work, inputs=inputs, sensitivities=sensitivities)
    spectra: Mapping[str, list[Spectrum]] = {}
    if budget.ratio is not None and isinstance(method, SharesByError):
        with run.phase("singular values"):
            spectra = measure_spectra(work, budget.matrices, run.executor)
    with (
        run.phase("codes"),
        bar("compressing", sum(run.finetuned.tensors[name].elements for name in budget.pairs)) as advance,
    ):
        advance(sum(entry.elements for entry in journal.entries.values()))
        work = replace(work, budgets=budget.share_out(journal.entries, spectra))
        if stream is not None and method.statistics == "second moments":
            _compress_by_layer(work, journal, stream, matrices, advance)
        left = [p.name for p in budget.matrices if p.name not in journal.entries]
        for name in run.executor.each(Matrices.compress, work, left):
            advance(journal.add(name).elements)
    _check_outcome(run, journal)


def _compress_by_layer(
    work: Matrices, journal: Journal, stream: CalibrationStream, matrices: set[str], advance: Callable[[int], None]
) -> None:
    """Compress the matrices of the decoder's layers in order, inputs coming through the layers already compressed."""

    def compress_matrix(name: str, second_moment: Tensor | None = None) -> None:
        work.compress(name, second_moment)
        advance(journal.add(name).elements)

    def compress_layer(second_moments: dict[str, Tensor]) -> None:
        for name in second_moments.keys() & (matrices - journal.entries.keys()):
            compress_matrix(name, second_moments[name])

    def rebuilt(name: str) -> Tensor:
        """A weight as the artifact will give it, compressed on the spot if it is not yet."""
        if name not in journal.entries:
            compress_matrix(name)
        entry = journal.entries[name]
        return rebuild(entry, entry.terms(journal.read), work.base)

    wanted = matrices - journal.entries.keys()
    stream.run(wanted.__contains__, work.finetuned.read_float, rebuilt, compress_layer)


def _store_exact(work: Matrices, p: Pair) -> None:
    """Store a weight as it is, unless it is the base's."""
    value = work.finetuned.read(p.name)
    if value.dtype.is_floating_point:
        work.finetuned.check_finite(p.name, value.float())
    same = False
    if p.base_name is not None:
        base = work.base.read(p.base_name)
        same = torch.equal(value, (base[: p.shape[0]] if p.shape else base).to(value.dtype))
    work.write(p.name, [] if same else [Dense(value)])


def _check_outcome(run: _Run, journal: Journal) -> None:
    """Refuse a fine-tune that is its base; warn of matrices for which the ratio leaves nothing."""
    entries = journal.entries
    if not any(entry.tensors() for entry in entries.values()):
        raise BadInputError(f"{run.finetuned.source} is the same model as {run.base.source}: no weight differs")
    dropped = [name for name, entry in entries.items() if entry.error is not None and not entry.tensors()]
    if dropped:
        run.warn(
            f"the ratio leaves {len(dropped)} of {len(run.budget.matrices)} matrices not even one component, so they "
            f"stay the base's ({dropped[0]} is one); lower the ratio, or the bits of the first components"
        )
