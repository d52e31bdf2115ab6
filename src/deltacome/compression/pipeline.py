"""The pipeline: pair the checkpoints, share out the bytes, compress every weight, write the artifact."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deltacome.checkpoints.adapter import Adapted, is_adapter
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.folding import Folded
from deltacome.checkpoints.pairing import Pair, pair
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.checkpoints.rebuilt import Rebuilt
from deltacome.compression.budget import DEFAULT_RATIO, Budget, check_ratio
from deltacome.compression.calibration import CalibrationStream, batch
from deltacome.compression.executors import Executor, ExecutorName, make_executor
from deltacome.compression.journal import Journal
from deltacome.compression.matrices import Matrices, count_layers, read_delta
from deltacome.compression.measuring import measure_inputs, measure_spectra
from deltacome.compression.methods import DEFAULT_METHOD, CodesBits, Method, SharesByError, describe, make_method
from deltacome.compression.writing import check_names, write_artifact
from deltacome.data import Encoder, read_examples
from deltacome.errors import BadInputError, DeltacomeError
from deltacome.files import disk_errors, raw
from deltacome.format.artifact import Artifact
from deltacome.format.lineage import MOST_PARENTS
from deltacome.format.manifest import MANIFEST, is_parent_name
from deltacome.format.terms import Dense
from deltacome.language import load_tokenizer
from deltacome.memory import peak_memory
from deltacome.outputs import refuse_existing
from deltacome.progress import bar, print_warning
from deltacome.version import __version__
from deltacome.weights import is_embedding

SUSPICIOUS_CHANGE = 0.5  # of the base's norm; a fine-tune changes a model by a few per cent
SAMPLED_WEIGHTS = 8
FEW = 1 / 4  # of the entries: where so few change, they do by a step or two
VALUE_BITS = 2  # of such an entry, besides its place
ALONE = ("bitdelta", "lossless")  # methods whose terms stand for a whole delta

Warn = Callable[[str], None]
Tokens = tuple[Tensor, Tensor]  # ids and mask, see `CalibrationStream`


def compress(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    ratio: float | None = None,
    method: str | None = None,
    embeddings: Literal["compress", "exact"] = "compress",
    calibration: str | Path | None = None,
    calibration_examples: int = 128,
    chat_template: str | None = None,
    fold_norms: bool = False,
    renames: Mapping[str, str] | None = None,
    parent: str | Path | None = None,
    engine: ExecutorName = "local",
    warn: Warn = print_warning,
    **settings: Any,
) -> dict[str, Any]:
    """Compress the delta between two checkpoints into the folder `out`.

    Args:
        base, finetuned: checkpoint folders or hub ids; `finetuned` may be a folder with a LoRA adapter of the base, or
            with a delta of it.
        ratio: bytes of the fine-tuned weights in 16 bit over those of the artifact, 16 by default. A method or
            precision plan that fixes its own size must reach it, if it is given.
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
        warn: called with each warning.
        settings: the method's own; None keeps its default.

    Returns:
        Sizes in bytes, `artifact_ratio`, `linear_ratio`, `seconds`, and `peak_bytes` of memory above that at the call.

    Raises:
        DeltacomeError: on any bad input; nothing is left behind then. After anything else that ends it early, a kill, a
            full disk, a lost worker, the same call goes on where it stopped.
    """
    started, out = time.monotonic(), Path(out)
    refuse_existing(out)
    if ratio is not None:
        check_ratio(ratio)
    method = method or (DEFAULT_METHOD if settings.get("precision") is None else "delta-come")
    chosen = make_method(method, **settings)
    if isinstance(chosen, CodesBits) and fold_norms:
        raise DeltacomeError(f"folding norms rounds weights, which method {method} does not; leave out --fold-norms")
    _check_statistics(method, chosen, calibration is not None, engine)
    if parent is not None:
        _check_child(method, chosen, fold_norms)
    with peak_memory() as peak:
        opened, exact = Checkpoint(base), embeddings == "exact"
        before = opened if parent is None else _open_parent(opened, parent, out)
        tuned = _open(opened, finetuned, exact, fold_norms, renames)
        if isinstance(tuned, Adapted):
            renames = None  # its names are the base's by now
        pairs = {p.name: p for p in pair(before, tuned, renames)}
        if parent is not None:
            _check_rows(before, tuned, pairs)
        budget = Budget(chosen, pairs, ratio, exact)
        run = _Run(before, tuned, budget, make_executor(engine), warn)
        tokens = None
        if calibration is not None:
            tokens = _read_tokens(opened, tuned, calibration, calibration_examples, chat_template)
        check_names(before, tuned)
        if not isinstance(chosen, CodesBits):
            _warn_of_odd_change(run)
        recorded = {**describe(method, chosen), "calibration_examples": len(tokens[0]) if tokens else 0}
        if isinstance(tuned, Folded):
            recorded["folded_norms"] = len(tuned.norms)
        with disk_errors(f"write {out}"):
            _make(run, out, recorded, tokens)
    artifact = Artifact(out)
    return {
        "artifact": str(out),
        "method": artifact.method,
        "artifact_bytes": artifact.bytes,
        "finetuned_bytes": artifact.finetuned_bytes,
        "artifact_ratio": round(artifact.ratio, 3),
        "linear_ratio": artifact.manifest["linear_ratio"],
        "seconds": round(time.monotonic() - started, 2),
        "peak_bytes": peak.bytes,
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


def _check_child(method: str, chosen: Method, fold_norms: bool) -> None:
    """Refuse what a delta on a delta cannot have."""
    if method in ALONE or getattr(chosen, "groups", None):
        what = f"method {method}" if method in ALONE else "terms with a scale a group"
        raise DeltacomeError(f"{what} cannot be added to those of a parent; leave out --parent, or take another method")
    if fold_norms:
        raise DeltacomeError(
            "norms are folded on the base's own, not on a parent's; leave out --fold-norms or --parent"
        )


def _open_parent(base: Checkpoint, parent: str | Path, out: Path) -> Rebuilt:
    """What a new delta in `out` is made on."""
    rebuilt = Rebuilt(base, parent)
    artifact, name = rebuilt.artifact, rebuilt.delta_name
    if any(entry.sign or entry.group_size or entry.coded for a in artifact.chain for entry in a.entries.values()):
        raise DeltacomeError(
            f"{parent} has terms that no others can be added to, its method being {artifact.method['name']}; leave out "
            "--parent"
        )
    if any(a.method.get("folded_norms") for a in artifact.chain):
        raise DeltacomeError(f"{parent} has folded norms, on which no delta can be made; compress without --parent")
    if len(artifact.chain) > MOST_PARENTS:
        raise DeltacomeError(f"{parent} is under {MOST_PARENTS} other deltas already; flatten it first")
    if not is_parent_name(name):
        raise DeltacomeError(f"{parent} cannot be a parent by the name {name!r}; rename its folder")
    beside = out.absolute().parent / name
    if "/" not in name and not (beside.is_dir() and beside.samefile(artifact.folder)):
        raise DeltacomeError(
            f"a delta looks for its parent beside itself; write to {artifact.folder.parent / out.name}"
        )
    return rebuilt


def _check_rows(parent: Checkpoint, finetuned: Checkpoint, pairs: Mapping[str, Pair]) -> None:
    """Refuse a vocabulary that is smaller than the parent's, whose terms are for all of its rows."""
    for p in pairs.values():
        if p.base_name is not None and p.shape < parent.tensors[p.base_name].shape:
            raise DeltacomeError(
                f"{p.name} has fewer rows in {finetuned.source} than in {parent.source}; compress without --parent"
            )


def _check_statistics(name: str, method: Method, has_data: bool, engine: ExecutorName) -> None:
    """Refuse calibration data that the method makes no use of, and a method that cannot do without."""
    if method.needs_calibration and not has_data:
        raise DeltacomeError(f"method {name} needs data with these settings; add --calibration FILE.jsonl")
    if method.statistics == "nothing" and has_data:
        raise DeltacomeError(f"method {name} makes no use of data with these settings; leave out --calibration")
    if engine != "local" and has_data and method.statistics == "second moments":
        raise DeltacomeError(f"method {name} goes through calibration data layer by layer; leave out --engine {engine}")


def _open(
    base: Checkpoint,
    finetuned: str | Path,
    exact_embeddings: bool,
    fold_norms: bool,
    renames: Mapping[str, str] | None,
) -> Checkpoint:
    """The fine-tuned side."""
    if is_adapter(finetuned):
        if fold_norms:
            raise DeltacomeError(f"norms cannot be folded in {finetuned}, a LoRA adapter; leave out --fold-norms")
        return Adapted(base, finetuned, renames)
    if (Path(finetuned) / MANIFEST).is_file():
        return Rebuilt(base, finetuned)
    return Folded(base, finetuned, exact_embeddings) if fold_norms else Checkpoint(finetuned)


@dataclass(frozen=True)
class _Run:
    """What one compression reads, what it may spend, where the work on matrices is done, and who hears of doubts."""

    base: Checkpoint
    finetuned: Checkpoint
    budget: Budget
    executor: Executor
    warn: Warn


def _warn_of_odd_change(run: _Run) -> None:
    """Look at a few matrices for a delta as large as the weights, the sign of a wrong base, or with few entries."""
    changed = total = 0.0
    matrices = run.budget.matrices
    entries: Counter[bool] = Counter()  # of all matrices and of those that are looked at: embeddings, and the others
    looked_at: Counter[bool] = Counter()
    differing: Counter[bool] = Counter()
    for p in matrices:
        entries[is_embedding(p.name)] += torch.Size(p.shape).numel()
    for p in matrices[:: max(1, len(matrices) // SAMPLED_WEIGHTS)]:
        delta, norm = read_delta(p, run.base, run.finetuned)
        changed, total = changed + float(delta.square().sum()), total + norm**2
        looked_at[is_embedding(p.name)] += delta.numel()
        differing[is_embedding(p.name)] += int(delta.count_nonzero())
    change = (changed / total) ** 0.5 if total else 0.0
    if change > SUSPICIOUS_CHANGE:
        run.warn(
            f"the delta is {change:.2f} times as large as the base's weights, where a fine-tune changes them by a "
            f"few per cent; is {run.base.source} the right base?"
        )
    shares = {kind: differing[kind] / count for kind, count in looked_at.items()}
    is_on_base = not isinstance(run.base, Rebuilt)
    if run.budget.ratio and is_on_base and any(shares.values()) and max(shares.values()) < FEW:
        known = sum(entries[kind] for kind in shares)
        share = sum(entries[kind] * share for kind, share in shares.items()) / known
        bits = sum(entries[kind] * _exact_bits(share) for kind, share in shares.items()) / known
        if bits < 16 / run.budget.ratio:
            run.warn(
                f"only some {100 * share:.2g} % of the weights differ from the base's; --lossless would keep every bit "
                f"of them in about 1/{16 / bits:.0f} of the bytes, for merging, not for serving"
            )


def _exact_bits(share: float) -> float:
    """What it takes to keep every bit of a matrix of which this share of the entries differs, in bits a weight."""
    places = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    return places + VALUE_BITS * share


def _make(run: _Run, out: Path, method: dict[str, Any], tokens: Tokens | None) -> None:
    """Compress into the folder `out`, going on from what a killed run of the same job has left."""
    job = {
        "deltacome": __version__,
        "checkpoints": [run.base.stamp(), run.finetuned.stamp()],
        "method": method,
        "ratio": run.budget.ratio,
        "exact": sorted(run.budget.uncounted),
        "base names": [p.base_name for p in run.budget.pairs.values()],
        "calibration": hashlib.sha256(raw(tokens[0])).hexdigest() if tokens else None,
    }
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
    stream = CalibrationStream(run.finetuned, *tokens) if tokens else None
    layers = count_layers(p.name for p in budget.matrices)
    bits = 16 / (budget.ratio or DEFAULT_RATIO)
    work = Matrices(run.base, run.finetuned, method, journal.store, budget.pairs, layers, bits)
    matrices = {p.name for p in budget.matrices}
    for name in budget.pairs.keys() - matrices - journal.entries.keys():
        _store_exact(work, budget.pairs[name])
        journal.add(name)
    budget.check_reachable(journal.entries)
    if method.statistics == "energies":
        energies, sensitivities = measure_inputs(run.finetuned, budget.matrices, stream, journal.store, run.warn)
        work = replace(work, energies=energies, sensitivities=sensitivities)
    shares_by_error = budget.ratio is not None and isinstance(method, SharesByError)
    spectra = measure_spectra(work, budget.matrices, run.executor) if shares_by_error else {}
    with bar("compressing", sum(run.finetuned.tensors[name].elements for name in budget.pairs)) as advance:
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


def _read_tokens(
    base: Checkpoint, finetuned: Checkpoint, calibration: str | Path, count: int, chat_template: str | None
) -> Tokens:
    if isinstance(finetuned, Rebuilt):
        raise DeltacomeError(f"{finetuned.source} is a delta; merge it, and calibrate on that")
    examples = read_examples(calibration, count)
    tokenizer = load_tokenizer(finetuned.source, finetuned.tokenizer_folder, base.folder)
    return batch(examples, Encoder(tokenizer, chat_template))
