"""The pipeline: pair the checkpoints, share out the bytes, compress every weight, write the artifact."""

import hashlib
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deltacome.checkpoints.adapter import Adapted, is_adapter
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.folding import Folded
from deltacome.checkpoints.pairing import Pair, pair
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.compression.allocation import Spectrum, allocate, spent_bits
from deltacome.compression.calibration import CalibrationStream, batch, random_tokens
from deltacome.compression.executors import Engine, EngineName, make_engine
from deltacome.compression.journal import Journal, work_folder
from deltacome.compression.matrices import Matrices, read_delta
from deltacome.compression.methods import DEFAULT_METHOD, Method, SharesByError, describe, make_method
from deltacome.data import Encoder, read_examples
from deltacome.errors import DeltacomeError, UnreachableRatioError
from deltacome.files import disk_errors, publish, raw, refuse_existing, sha256, shard_names, shards, write_safetensors
from deltacome.format.artifact import Artifact
from deltacome.format.card import model_card
from deltacome.format.manifest import FORMAT_VERSION, MANIFEST, MODEL_CARD, WEIGHTS, Entry, linear_ratio, write_manifest
from deltacome.format.terms import Dense, component_bits
from deltacome.memory import peak_memory
from deltacome.progress import bar, print_warning
from deltacome.version import __version__
from deltacome.weights import is_embedding, module_kind

DEFAULT_RATIO = 16.0
SHARD_BYTES = 5 * 10**9
TYPICAL_TERMS = ((8, 2), (4, 32), (3, 32), (2, 32), (1, 100))  # for the length of an entry
FIXED_METADATA = 1200  # bytes of the manifest and headers besides the weights' own
SHARINGS = 3  # what the metadata take depends on the outcome
RATIO_TOLERANCE = 0.01
SMALLEST_OUTPUT = 1e-3  # energy, for inputs of energy 1; layers that are all zero have none
SUSPICIOUS_CHANGE = 0.5  # of the base's norm; a fine-tune changes a model by a few per cent
SAMPLED_WEIGHTS = 8

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
    engine: EngineName = "local",
    warn: Warn = print_warning,
    **settings: Any,
) -> dict[str, Any]:
    """Compress the delta between two checkpoints into the folder `out`.

    Args:
        base, finetuned: checkpoint folders or hub ids; `finetuned` may be a folder with a LoRA adapter of the base.
        ratio: bytes of the fine-tuned weights in 16 bit over those of the artifact, 16 by default. A method or
            precision plan that fixes its own size must reach it, if it is given.
        method: one of `deltacome.methods.METHODS`; by default `delta-come` for a precision plan, else the first.
        embeddings: `exact` keeps changed embeddings and the head as they are and leaves them out of the ratio's sum.
        calibration: JSONL file of examples (see `deltacome.data.read_examples`). Without it no data is used; methods
            that weigh inputs measure them on random tokens.
        calibration_examples: how many of the file's first lines are used.
        chat_template: Jinja file, or `none`, in place of the tokenizer's own template.
        fold_norms: put what changed in a norm into the layers behind it, where that is exact; see
            `deltacome.folding.Folded`.
        renames: beginnings of the fine-tuned weights' names and the base's for them, if they differ.
        engine: where the work on matrices is done, see `deltacome.engines`.
        warn: called with each warning.
        settings: the method's own; None keeps its default.

    Returns:
        Sizes in bytes, `artifact_ratio`, `linear_ratio`, `seconds`, and `peak_bytes` of memory above that at the call.

    Raises:
        DeltacomeError: on any bad input; nothing is left behind then. A killed run is resumed by the same call.
    """
    started, out = time.monotonic(), Path(out)
    if (out / MANIFEST).is_file():
        shutil.rmtree(work_folder(out), ignore_errors=True)  # left by a kill after the last step
    refuse_existing(out)
    if ratio is not None and not ratio > 0:
        raise DeltacomeError(f"a ratio of {ratio:g} means nothing; give a number above 1, such as 16")
    method = method or (DEFAULT_METHOD if settings.get("precision") is None else "delta-come")
    chosen = make_method(method, **settings)
    if chosen.needs_calibration and calibration is None:
        raise DeltacomeError(f"method {method} needs data with these settings; add --calibration FILE.jsonl")
    if chosen.statistics == "nothing" and calibration is not None:
        raise DeltacomeError(f"method {method} makes no use of data with these settings; leave out --calibration")
    if engine != "local" and calibration is not None and chosen.statistics == "second moments":
        raise DeltacomeError(
            f"method {method} goes through calibration data layer by layer; leave out --engine {engine}"
        )
    with peak_memory() as peak:
        theirs, exact = Checkpoint(base), embeddings == "exact"
        ours = _open(theirs, finetuned, exact, fold_norms)
        run = _Run(theirs, ours, chosen, exact, ratio, renames, make_engine(engine), warn)
        tokens = None
        if calibration is not None:
            tokens = _read_tokens(run.finetuned, calibration, calibration_examples, chat_template)
        run.warn_of_large_change()
        recorded = {**describe(method, chosen), "calibration_examples": len(tokens[0]) if tokens else 0}
        if isinstance(ours, Folded):
            recorded["folded_norms"] = len(ours.norms)
        with disk_errors(f"write {out}"):
            run.make(out, recorded, tokens)
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


def _open(base: Checkpoint, finetuned: str | Path, exact_embeddings: bool, fold_norms: bool) -> Checkpoint:
    """The fine-tuned side."""
    if is_adapter(finetuned):
        if fold_norms:
            raise DeltacomeError(f"norms cannot be folded in {finetuned}, a LoRA adapter; leave out --fold-norms")
        return Adapted(base, finetuned)
    return Folded(base, finetuned, exact_embeddings) if fold_norms else Checkpoint(finetuned)


class _Run:
    """One compression: what it reads and how. `journal` holds what is finished."""

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        method: Method,
        exact_embeddings: bool,
        ratio: float | None,
        renames: Mapping[str, str] | None,
        engine: Engine,
        warn: Warn,
    ) -> None:
        self.base, self.finetuned, self.method, self.engine, self.warn = base, finetuned, method, engine, warn
        self.pairs = {p.name: p for p in pair(base, finetuned, renames)}
        self.kept = {name for name in self.pairs if exact_embeddings and is_embedding(name)}
        self.matrices = [p for p in self.pairs.values() if p.is_matrix and p.name not in self.kept]
        self.asked_ratio = ratio
        self.ratio = (ratio or DEFAULT_RATIO) if method.spends_a_budget else None
        self.group_size = getattr(method, "group_size", None) or 0

    def warn_of_large_change(self) -> None:
        """Look at a few matrices for a delta as large as the weights: the sign of a wrong base."""
        changed = total = 0.0
        for p in self.matrices[:: max(1, len(self.matrices) // SAMPLED_WEIGHTS)]:
            delta, norm = read_delta(p, self.base, self.finetuned)
            changed, total = changed + float(delta.square().sum()), total + norm**2
        change = (changed / total) ** 0.5 if total else 0.0
        if change > SUSPICIOUS_CHANGE:
            self.warn(
                f"the delta is {change:.2f} times as large as the base's weights, where a fine-tune changes them by a "
                f"few per cent; is {self.base.source} the right base?"
            )

    def make(self, out: Path, method: dict[str, Any], tokens: Tokens | None) -> None:
        """Compress into the folder `out`, going on from what a killed run of the same job has left."""
        job = {
            "deltacome": __version__,
            "checkpoints": [self.base.stamp(), self.finetuned.stamp()],
            "method": method,
            "ratio": self.asked_ratio,
            "exact": sorted(self.kept),
            "base names": [p.base_name for p in self.pairs.values()],
            "calibration": hashlib.sha256(raw(tokens[0])).hexdigest() if tokens else None,
        }
        self.journal = Journal(out, job)
        # The experts of a layer count once.
        layers = Counter(kind for kind, _ in {(module_kind(p.name), _layer(p.name)) for p in self.matrices})
        bits, store = 16 / (self.ratio or DEFAULT_RATIO), self.journal.store
        self.work = Matrices(self.base, self.finetuned, self.method, store, self.pairs, layers, bits)
        useless = False
        try:
            self._compress(tokens)
            self._write(out, method)
            useless = True
        except (DeltacomeError, OSError):  # bad input or a full disk; after anything else the work is worth keeping
            useless = True
            raise
        finally:
            self.journal.close(remove=useless)

    def _compress(self, tokens: Tokens | None) -> None:
        """Compress every weight that the journal lacks."""
        journal = self.journal
        total = sum(self.finetuned.tensors[name].elements for name in self.pairs)
        done = sum(entry.elements for entry in journal.entries.values())
        if journal.entries:
            self.warn(
                f"going on with the interrupted run: {len(journal.entries)} of {len(self.pairs)} weights are done"
            )
        # Opened first: an architecture that cannot be calibrated is found out before the work.
        stream = CalibrationStream(self.finetuned, *tokens) if tokens else None
        if self.method.statistics == "energies":
            self._measure_energies(stream)
        spectra = self._spectra()
        with bar("compressing", total) as self.advance:
            self.advance(done)
            matrices = {p.name for p in self.matrices}
            for name in self.pairs.keys() - matrices - journal.entries.keys():
                self._keep(self.pairs[name])
            self._share_out(spectra)
            if stream is not None and self.method.statistics == "second moments":
                wanted = matrices - journal.entries.keys()
                stream.run(wanted.__contains__, self.finetuned.read_float, self._rebuilt, self._compress_layer)
            left = [p.name for p in self.matrices if p.name not in journal.entries]
            for name in self.engine.each(Matrices.compress, self.work, left):
                self._finish(name)
        if not any(entry.tensors() for entry in journal.entries.values()):
            raise DeltacomeError(f"{self.finetuned.source} is the same model as {self.base.source}: no weight differs")
        dropped = [name for name, entry in journal.entries.items() if entry.error is not None and not entry.tensors()]
        if dropped:
            self.warn(
                f"the ratio leaves {len(dropped)} of {len(self.matrices)} matrices not even one component, so they "
                f"stay the base's ({dropped[0]} is one); lower the ratio, or the bits of the first components"
            )

    def _measure_energies(self, calibration: CalibrationStream | None) -> None:
        """Set energies and sensitivities: by random tokens, and in equal parts by the calibration data, if any."""
        measured = self.journal.store.kept("energies")
        if measured is None:
            measured = self._measured_energies(calibration)
            self.journal.store.keep("energies", measured)
        sensitivities = self.work.sensitivities
        weighted = total = 0.0
        for name, energies in sorted(measured.items()):  # in one order, or the sums differ in the last bit
            self.work.energies[name] = energies[:-1]
            sensitivities[name] = 1 / max(float(energies[-1]), SMALLEST_OUTPUT)
            elements = torch.Size(self.pairs[name].shape).numel()
            weighted, total = weighted + elements * math.log(sensitivities[name]), total + elements
        for name in measured:
            sensitivities[name] /= math.exp(weighted / total)

    def _measured_energies(self, calibration: CalibrationStream | None) -> dict[str, Tensor]:
        """Energies by matrix as `CalibrationStream.energies` has them, scaled to a mean of 1 over the inputs."""
        names = {p.name for p in self.matrices if not is_embedding(p.name)}
        total = (2 if calibration else 1) * sum(torch.Size(self.pairs[name].shape).numel() for name in names)
        with bar("measuring inputs", total) as advance:
            measured = []
            try:
                stream = CalibrationStream(self.finetuned, *random_tokens(self.finetuned))
                measured.append(stream.energies(names.__contains__, self.finetuned.read_float, advance))
            except Exception as error:
                # Models fail to be built or run in many ways, and the method can do without.
                reason = str(error).splitlines()[0].split(";")[0] if str(error) else type(error).__name__
                self.warn(f"the inputs of the layers could not be measured, so all count alike: {reason}")
            if calibration is not None:
                measured.append(calibration.energies(names.__contains__, self.finetuned.read_float, advance))
        merged: dict[str, Tensor] = {}
        for name in names & set().union(*measured):
            found = [energies[name] for energies in measured if name in energies]
            mean = torch.stack([x / x[:-1].mean().clamp_min(1e-30) for x in found]).mean(0)
            if torch.isfinite(mean).all():  # not so if the model overflows; then this layer's inputs count alike
                merged[name] = mean
        return merged

    def _spectra(self) -> dict[str, Spectrum]:
        """What the method needs for sharing out the bits by the errors of all matrices; empty if it does not."""
        if self.ratio is None or not isinstance(self.method, SharesByError):
            return {}
        store, names = self.journal.store, [p.name for p in self.matrices]
        kept = {name: store.kept(f"spectrum of {name}") for name in names}
        left = [name for name in names if kept[name] is None]
        with bar("singular values", sum(torch.Size(self.pairs[name].shape).numel() for name in left)) as advance:
            for name in self.engine.each(Matrices.measure, self.work, left):
                kept[name] = store.kept(f"spectrum of {name}")
                advance(torch.Size(self.pairs[name].shape).numel())
        return {name: Spectrum.of_tensors(tensors) for name, tensors in kept.items() if tensors}

    def _write(self, out: Path, method: dict[str, Any]) -> None:
        """Put the artifact together in the journal's folder and give it its name."""
        journal = self.journal
        folder = journal.folder / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        entries = [journal.entries[name] for name in sorted(journal.entries)]
        specs = {name: spec for entry in entries for name, spec in entry.tensors().items()}
        # Larger items first keeps every tensor aligned to its item size.
        order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
        sizes = {name: specs[name][0].itemsize * torch.Size(specs[name][1]).numel() for name in order}
        runs = shards(sizes, SHARD_BYTES)
        files = {
            file: write_safetensors(folder / file, {name: specs[name] for name in names}, journal.read)
            for file, names in zip(shard_names(WEIGHTS, len(runs)), runs, strict=True)
        }
        weight_bytes = sum((folder / file).stat().st_size for file in files)
        base_files = {}
        for path in self.finetuned.sidecars():
            digest = sha256(path)
            if digest == self.base.sidecar_digest(path.name):
                base_files[path.name] = digest
            else:
                shutil.copyfile(path, folder / path.name)
                files[path.name] = digest
        manifest = {
            "format_version": FORMAT_VERSION,
            "deltacome": __version__,
            "method": method,
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint()},
            "finetuned": {"name": self.finetuned.name},
            "finetuned_bytes": 2 * self.finetuned.elements,
            "linear_ratio": round(linear_ratio(entries), 3),
            "files": files,
            "base_files": base_files,
            "weights": {entry.name: entry.fields() for entry in entries},
        }
        write_manifest(folder, manifest, weight_bytes)
        artifact = Artifact(folder)
        self._check_ratio(artifact)
        (folder / MODEL_CARD).write_text(model_card(artifact), encoding="utf-8")
        publish(folder, out)

    def _share_out(self, spectra: dict[str, Spectrum]) -> None:
        """Set the bits that each matrix may take, so that the whole artifact meets the ratio."""
        if self.ratio is None:
            return
        elements = sum(torch.Size(p.shape).numel() for p in self.matrices)
        overhead = self._overhead({p.name: TYPICAL_TERMS for p in self.matrices})
        allowed = 2 * self._counted_elements / self.ratio - overhead
        budgets = {p.name: 8 * allowed * torch.Size(p.shape).numel() / elements for p in self.matrices}
        for _ in range(SHARINGS if spectra else 0):
            widths = dict(zip(spectra, allocate(list(spectra.values()), 8 * allowed), strict=True))
            budgets = {name: spent_bits(spectrum, widths[name]) for name, spectrum in spectra.items()}
            allowed = 2 * self._counted_elements / self.ratio - self._overhead(
                {name: [(b, count) for b, count in enumerate(found.bincount().tolist()) if b and count]
                 for name, found in widths.items()}
            )  # fmt: skip
        if not any(component_bits(1, *p.shape) <= budgets.get(p.name, 0) for p in self.matrices):
            least = overhead + min(component_bits(1, *p.shape) for p in self.matrices) / 8
            raise UnreachableRatioError(
                f"a ratio of {self.ratio:g} cannot be reached: what is stored exactly and the metadata take "
                f"{overhead:,} bytes, and one component more; at most {2 * self._counted_elements / least:.0f} could be"
            )
        self.work.budgets.update(budgets)

    def _overhead(self, terms: dict[str, Sequence[tuple[int, int]]]) -> int:
        """Bytes of all but the components, if the matrices have factored terms of these bits and ranks."""
        shared = self.kept | {p.name for p in self.matrices}
        overhead = FIXED_METADATA + sum(e.bytes for name, e in self.journal.entries.items() if name not in shared)
        for p in self.matrices:
            factored = tuple(terms.get(p.name, ()))
            rotated = "uv" if isinstance(self.method, SharesByError) else ""
            typical = Entry(
                p.name, p.shape, p.dtype, p.base_name, factored, rotated, group_size=self.group_size, error=0.1234
            )
            overhead += typical.metadata_bytes + (p.shape[0] - p.rows) * p.shape[1] * p.dtype.itemsize
        return overhead

    @property
    def _counted_elements(self) -> int:
        """Weights that the ratio is about."""
        return sum(torch.Size(p.shape).numel() for p in self.pairs.values() if p.name not in self.kept)

    def _check_ratio(self, artifact: Artifact) -> None:
        """Refuse an artifact that misses a ratio that was asked for."""
        counted = artifact.bytes - sum(artifact.entries[name].bytes for name in self.kept)
        reached = 2 * self._counted_elements / counted
        if self.asked_ratio is not None and reached < self.asked_ratio * (1 - RATIO_TOLERANCE):
            raise UnreachableRatioError(
                f"a ratio of {self.asked_ratio:g} cannot be reached with this method and plan: "
                f"everything counted, they come to {reached:.2f}"
            )

    def _keep(self, p: Pair) -> None:
        """Store a weight as it is, unless it is the base's."""
        value = self.finetuned.read(p.name)
        if value.dtype.is_floating_point:
            self.finetuned.check_finite(p.name, value.float())
        same = False
        if p.base_name is not None and p.rows == (p.shape[0] if p.shape else 0):
            theirs = self.base.read(p.base_name)
            same = torch.equal(value, (theirs[: p.rows] if theirs.ndim else theirs).to(value.dtype))
        self.work.write(p.name, [] if same else [Dense(value)])
        self._finish(p.name)

    def _compress_layer(self, second_moments: dict[str, Tensor]) -> None:
        for name, second_moment in second_moments.items():
            if name in self.pairs and name not in self.journal.entries and self.pairs[name].is_matrix:
                self.work.compress(name, second_moment)
                self._finish(name)

    def _finish(self, name: str) -> None:
        self.advance(self.journal.add(name).elements)

    def _rebuilt(self, name: str) -> Tensor:
        """A weight as the artifact will give it, compressed on the spot if it is not yet."""
        if name not in self.journal.entries:
            self.work.compress(name)
            self._finish(name)
        entry = self.journal.entries[name]
        return rebuild(entry, entry.terms(self.journal.read), self.base)


def _layer(name: str) -> str:
    """A weight's name up to its layer's number, which comes before that of an expert."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def _read_tokens(finetuned: Checkpoint, calibration: str | Path, count: int, chat_template: str | None) -> Tokens:
    from transformers import AutoTokenizer

    examples = read_examples(calibration, count)
    try:
        tokenizer = AutoTokenizer.from_pretrained(finetuned.tokenizer_folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"calibration needs the tokenizer of {finetuned.source}: {reason}") from error
    return batch(examples, Encoder(tokenizer, chat_template))
