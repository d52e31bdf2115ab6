"""The artifact: a folder that holds one compressed delta. `docs/format.md` is the specification."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, sha256
from deltacome.format import digests
from deltacome.format.entries import WeightEntry
from deltacome.format.lineage import ParentError, find_lineage, locate_artifact
from deltacome.format.manifest import (
    MANIFEST,
    SKETCH_VERSION,
    check_fields,
    is_weight_file,
    read_manifest,
    travelling_file_name,
)
from deltacome.format.terms import Dense, Term, of_rows
from deltacome.weights import split_stack

Read = Callable[[str], Tensor]  # a tensor by its name


class Artifact:
    """A compressed delta in a folder, or on the Hub by its id.

    Opening it reads the manifest and the headers, and opens its parent if it is a delta on a delta; tensors are read on
    demand. `chain` is the artifact, its parent, that one's parent, and so on.

    `entries` is what the manifest says of each weight, and `weights` what it comes to with the parent: `base` is the
    base's weight, and `dense` and `error` are the parent's where the artifact has none of its own. `stored` has the
    latter by the names of a checkpoint, a stack's matrices together.

    Args:
        parent: the opened parent, if it is not to be looked for.

    Raises:
        DeltacomeError: if the folder is no artifact, of another format version, or broken in a way that shows without
            reading the tensors; `check_digests` finds the rest. If a parent is missing, or not the right one.
    """

    def __init__(self, source: str | Path, parent: "Artifact | None" = None) -> None:
        self.folder = locate_artifact(source)
        self.manifest = read_manifest(self.folder)
        self.parent = parent or self._open_parent()
        digest = None if self.parent is None else self.parent.manifest["sha256"]
        if digest != self.manifest.get("parent", {}).get("sha256"):
            raise ParentError(f"the parent of {self.folder} has changed meanwhile; start again")
        self.chain: list[Artifact] = [self, *(self.parent.chain if self.parent is not None else [])]
        try:
            self._parse()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._broken(f"{MANIFEST} is not as the format has it ({error})") from error
        self._check_headers()

    def _open_parent(self) -> "Artifact | None":
        found: Artifact | None = None
        try:
            for folder in reversed(find_lineage(self.folder, self.manifest)):
                found = Artifact(folder, found)
        except DeltacomeError as error:
            raise ParentError(str(error)) from error
        return found

    def _parse(self) -> None:
        check_fields(self.manifest)
        self.method: dict[str, Any] = self.manifest["method"]
        self.base_name: str = self.manifest["base"]["name"]
        self.fingerprint: str = self.manifest["base"]["fingerprint"]
        self.finetuned_bytes: int = self.manifest["finetuned_bytes"]
        self.files: dict[str, str] = self.manifest["files"]
        self.base_files: dict[str, str] = self.manifest["base_files"]
        for name in (*self.files, *self.base_files):
            if name in self.base_files or not is_weight_file(name):
                travelling_file_name(name)
        self.entries: dict[str, WeightEntry] = {}
        for name, fields in self.manifest["weights"].items():
            try:
                self.entries[name] = WeightEntry.parse(name, fields)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
        is_sketched = any(entry.sketched for entry in self.entries.values())
        if is_sketched != (self.manifest["format_version"] == SKETCH_VERSION):
            raise ValueError(f"a sketch is in version {SKETCH_VERSION}, and in no other")
        self.weights = self.entries if self.parent is None else self._with_parent(self.parent)
        self._check_stacks()

    def _with_parent(self, parent: "Artifact") -> dict[str, WeightEntry]:
        """`weights`."""
        if self.fingerprint != parent.fingerprint:
            raise ValueError("its parent is a delta on another base")
        above = {**parent.base_files, **parent.files}
        for name, digest in self.base_files.items():
            if above.get(name, digest) != digest:
                raise ValueError(f"{name} is not its parent's")
        weights = {}
        for name, entry in self.entries.items():
            weights[name] = entry if entry.dense == 0 else entry.on(parent.weights.get(str(entry.base)))
        return weights

    def _check_stacks(self) -> None:
        self.stored: dict[str, list[WeightEntry]] = {}
        for name in sorted(self.weights, key=lambda name: (split_stack(name)[0], split_stack(name)[1] or 0)):
            self.stored.setdefault(split_stack(name)[0], []).append(self.weights[name])
        for stored, entries in self.stored.items():
            numbers = [split_stack(entry.name)[1] for entry in entries]
            if numbers != [None] and numbers != list(range(len(numbers))):
                raise ValueError(f"the matrices of {stored} are not numbered from 0")
            if len({(entry.shape, entry.dtype) for entry in entries}) > 1:
                raise ValueError(f"the matrices of {stored} differ in shape or dtype")

    def stored_shape(self, name: str) -> list[int]:
        """The shape of a weight of that name in `stored`, which has the entries by the names of a checkpoint."""
        entries = self.stored[name]
        shape = list(entries[0].shape)
        return shape if split_stack(entries[0].name)[1] is None else [len(entries), *shape]

    def _check_headers(self) -> None:
        """Every tensor that the manifest implies is there with its dtype and shape, and no other."""
        expected = {name: spec for entry in self.entries.values() for name, spec in entry.tensors().items()}
        self.locations: dict[str, Path] = {}
        for path in self.weight_files:
            if not path.is_file():
                raise self._broken(f"{path.name} is missing")
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        part = file.get_slice(name)
                        dtype, shape = expected.get(name, (None, None))
                        if dtype is None or SAFETENSORS_DTYPES[dtype] != part.get_dtype() or shape != part.get_shape():
                            raise self._broken(f"{name} in {path.name} is not what {MANIFEST} says")
                        self.locations[name] = path
            except (SafetensorError, OSError) as error:
                raise self._broken(f"{path.name} is truncated or damaged: {error}") from error
        for name in expected.keys() - self.locations.keys():
            raise self._broken(f"{name} is missing")

    @property
    def weight_files(self) -> list[Path]:
        """`delta.safetensors` or its shards."""
        return [self.folder / name for name in self.files if is_weight_file(name)]

    def sidecars(self) -> dict[str, Path | None]:
        """The fine-tuned model's files beside its weights, by name: where each is, None for the base's own."""
        above = {} if self.parent is None else self.parent.sidecars()
        own = {name: self.folder / name for name in self.files if not is_weight_file(name)}
        return {name: above.get(name) for name in self.base_files} | own

    @property
    def bytes(self) -> int:
        """Bytes on disk of the weights and the manifest, a parent's left out."""
        return sum(path.stat().st_size for path in [*self.weight_files, self.folder / MANIFEST])

    @property
    def ratio(self) -> float:
        """Artifact ratio: bytes of the fine-tuned weights in 16 bit over `bytes`."""
        return self.finetuned_bytes / self.bytes

    @property
    def chain_bytes(self) -> int:
        """`bytes` of it and of all above it."""
        return sum(artifact.bytes for artifact in self.chain)

    def terms(self, name: str) -> list[Term]:
        """The terms of one weight, its parent's included.

        Raises:
            DeltacomeError: if a scale is NaN or infinite, or the rows are not as many as the manifest says.
        """
        with ExitStack() as stack:
            return self._terms(name, self._readers(stack))

    def own_terms(self, name: str) -> list[Term]:
        """The terms of one weight that it stores itself.

        Raises:
            DeltacomeError: as `terms`.
        """
        with ExitStack() as stack:
            return self._own_terms(name, self._reader(stack))

    def all_terms(self) -> Iterator[tuple[WeightEntry, list[Term]]]:
        """Every weight's entry, of `weights`, and terms, each file being opened once.

        Raises:
            DeltacomeError: as `terms`.
        """
        with ExitStack() as stack:
            readers = self._readers(stack)
            for name, entry in self.weights.items():
                yield entry, self._terms(name, readers)

    def _terms(self, name: str, readers: Sequence[Read]) -> list[Term]:
        """What is added, the parent's first; then the exact rows, which replace."""
        terms, entry = self._own_terms(name, readers[0]), self.entries[name]
        if self.parent is None or entry.dense == 0:
            return terms
        above = self.parent._terms(str(entry.base), readers[1:])
        rows = self.parent.weights[str(entry.base)].shape[:1]
        if rows != entry.shape[:1]:
            above = of_rows(above, rows[0])
        dense = [term for term in (*above, *terms) if isinstance(term, Dense)]
        return [term for term in (*above, *terms) if not isinstance(term, Dense)] + dense[-1:]

    def _own_terms(self, name: str, read: Read) -> list[Term]:
        try:
            return self.entries[name].terms(read)
        except ValueError as error:
            raise self._broken(str(error)) from error

    def _readers(self, stack: ExitStack) -> list[Read]:
        """One for each of the chain, see `_reader`."""
        return [artifact._reader(stack) for artifact in self.chain]

    def _reader(self, stack: ExitStack) -> Read:
        """Reads tensors by name, from files that stay open as long as the stack."""
        files: dict[Path, Any] = {}

        def read(tensor: str) -> Tensor:
            path = self.locations[tensor]
            try:
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, "pt"))
                found: Tensor = files[path].get_tensor(tensor)
            except (SafetensorError, OSError) as error:
                raise self._broken(f"{tensor} cannot be read: {error}") from error
            if tensor.endswith(("scales", "scale")) and not torch.isfinite(found).all():
                raise self._broken(f"{tensor} holds NaN or infinity")
            return found

        return read

    def check_digests(self) -> None:
        """Compare every file with its SHA-256, the parent's too.

        Raises:
            DeltacomeError: naming the first file that differs.
        """
        for artifact in self.chain:
            artifact._check(sha256)

    def check_files(self) -> None:
        """As `check_digests`, but this process reads no file twice that has not been written since; see `digests`.

        Raises:
            DeltacomeError: naming the first file that differs.
        """
        for artifact in self.chain:
            artifact._check(digests.sha256)

    def _check(self, digest_of: Callable[[Path], str]) -> None:
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise self._broken(f"{name} is missing")
            try:
                found = digest_of(path)
            except OSError as error:
                raise self._broken(f"{name} cannot be read: {error.strerror}") from error
            if found != digest:
                raise self._broken(f"{name} is not the file that was written (its SHA-256 differs)")

    def _broken(self, why: str) -> DeltacomeError:
        return DeltacomeError(f"{self.folder} is a broken artifact: {why}; fetch or compress it again")
