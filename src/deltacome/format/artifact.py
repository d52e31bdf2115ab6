"""The artifact: a folder that holds one compressed delta. `docs/format.md` is the specification."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, SIDECARS, sha256
from deltacome.format.manifest import MANIFEST, MODEL_CARD, WeightEntry, plain_file_name, read_manifest
from deltacome.format.terms import Term
from deltacome.hub import locate
from deltacome.weights import split_stack


def locate_artifact(source: str | Path) -> Path:
    """The folder of an artifact, which may be named by a hub id.

    Raises:
        DeltacomeError: if there is none.
    """
    return locate(str(source), [MANIFEST, MODEL_CARD, "*.safetensors", *SIDECARS])


class Artifact:
    """A compressed delta in a folder, or on the Hub by its id.

    Opening it reads the manifest and the headers; tensors are read on demand.

    Raises:
        DeltacomeError: if the folder is no artifact, of another format version, or broken in a way that shows without
            reading the tensors. `check_digests` finds the rest.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = locate_artifact(source)
        self.manifest = read_manifest(self.folder)
        try:
            self._parse()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._broken(f"{MANIFEST} is not as the format has it ({error})") from error
        self._check_headers()

    def _parse(self) -> None:
        self.method: dict[str, Any] = self.manifest["method"]
        self.base_name = str(self.manifest["base"]["name"])
        self.fingerprint = str(self.manifest["base"]["fingerprint"])
        self.finetuned_bytes = int(self.manifest["finetuned_bytes"])
        self.files = {plain_file_name(name): str(digest) for name, digest in self.manifest["files"].items()}
        self.base_files = {plain_file_name(name): str(digest) for name, digest in self.manifest["base_files"].items()}
        self.entries: dict[str, WeightEntry] = {}
        for name, fields in self.manifest["weights"].items():
            try:
                self.entries[name] = WeightEntry.parse(name, fields)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
        self._check_stacks()

    def _check_stacks(self) -> None:
        self.stored: dict[str, list[WeightEntry]] = {}
        for name in sorted(self.entries, key=lambda name: (split_stack(name)[0], split_stack(name)[1] or 0)):
            self.stored.setdefault(split_stack(name)[0], []).append(self.entries[name])
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
        return [self.folder / name for name in self.files if name.endswith(".safetensors")]

    @property
    def bytes(self) -> int:
        """Bytes on disk of the weights and the manifest."""
        return sum(path.stat().st_size for path in [*self.weight_files, self.folder / MANIFEST])

    @property
    def ratio(self) -> float:
        """Artifact ratio: bytes of the fine-tuned weights in 16 bit over `bytes`."""
        return self.finetuned_bytes / self.bytes

    def terms(self, name: str) -> list[Term]:
        """The terms of one weight.

        Raises:
            DeltacomeError: if a scale is NaN or infinite, or the rows are not as many as the manifest says.
        """
        with ExitStack() as stack:
            return self._terms(name, self._reader(stack))

    def all_terms(self) -> Iterator[tuple[WeightEntry, list[Term]]]:
        """Every weight's entry and terms, each file being opened once.

        Raises:
            DeltacomeError: as `terms`.
        """
        with ExitStack() as stack:
            read = self._reader(stack)
            for name, entry in self.entries.items():
                yield entry, self._terms(name, read)

    def _terms(self, name: str, read: Callable[[str], Tensor]) -> list[Term]:
        try:
            return self.entries[name].terms(read)
        except ValueError as error:
            raise self._broken(str(error)) from error

    def _reader(self, stack: ExitStack) -> Callable[[str], Tensor]:
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
        """Compare every file with its SHA-256.

        Raises:
            DeltacomeError: naming the first file that differs.
        """
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise self._broken(f"{name} is missing")
            if sha256(path) != digest:
                raise self._broken(f"{name} is not the file that was written (its SHA-256 differs)")

    def _broken(self, why: str) -> DeltacomeError:
        return DeltacomeError(f"{self.folder} is a broken artifact: {why}; fetch or compress it again")
