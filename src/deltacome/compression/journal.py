"""The finished weights of a compression that is under way: each in a file of its own in the work folder."""

import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacome.files import sync
from deltacome.format.entries import WeightEntry
from deltacome.outputs import WorkFolder


@dataclass(frozen=True)
class Store:
    """A folder with a file for each result. Several processes may write to it; a file is there whole or not at all."""

    folder: Path

    def write(self, entry: WeightEntry, tensors: dict[str, Tensor]) -> None:
        """Store a finished weight; `tensors` by their names in the artifact."""
        _save(tensors, self.path(entry.name), {"name": entry.name, "fields": json.dumps(entry.fields())})

    def path(self, name: str) -> Path:
        """Where a finished weight of that name is."""
        return self.folder / f"{_digest(name)}.safetensors"

    def save_intermediate(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors of unfinished work under a key."""
        _save(tensors, self._intermediate(key), {})

    def load_intermediate(self, key: str) -> dict[str, Tensor] | None:
        """What `save_intermediate` was given, None if there is nothing whole under the key."""
        try:
            return load_file(self._intermediate(key))
        except (OSError, SafetensorError):
            return None

    def drop_intermediate(self, key: str) -> None:
        """Forget what `save_intermediate` was given, if anything."""
        self._intermediate(key).unlink(missing_ok=True)

    def _intermediate(self, key: str) -> Path:
        return self.folder / f"{_digest(key)}.intermediate"


class Journal:
    """Finished weights by name. store: where they are.

    Args:
        out: the output that is being made.
        job: everything that the result depends on. A folder left by another job is emptied.

    Raises:
        DeltacomeError: if another process is making the same output.
    """

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        self.work = WorkFolder(out, job)
        self.store = Store(self.work.path)
        self.files: dict[str, Path] = {}
        self.entries: dict[str, WeightEntry] = {}
        try:
            for path in self.work.path.glob("*.partial"):  # a killed process was at it
                path.unlink()
            for path in self.work.path.glob("*.safetensors"):
                if not self._load(path):
                    path.unlink()  # torn; the weight is done again
        except BaseException:
            self.work.close()
            raise

    def _load(self, path: Path) -> bool:
        """Take up the weight in a file; whether the file is whole."""
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata(), set(file.keys())
            name = metadata["name"]
            entry = WeightEntry.parse(name, json.loads(metadata["fields"]))
        except (SafetensorError, KeyError, TypeError, ValueError):
            return False
        if path != self.store.path(name) or tensors != entry.tensors().keys():
            return False
        self.files[name], self.entries[name] = path, entry
        return True

    def add(self, name: str) -> WeightEntry:
        """Take up a weight that has been stored."""
        if not self._load(self.store.path(name)):
            raise OSError(errno.EIO, "it was written and cannot be read again", str(self.store.path(name)))
        return self.entries[name]

    def read(self, tensor: str) -> Tensor:
        """A tensor of a finished weight, by its name in the artifact."""
        with safe_open(self.files[tensor.rpartition(".")[0]], "pt") as file:
            return file.get_tensor(tensor)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    partial = path.with_suffix(f".{uuid4().hex}.partial")  # of this process alone
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        # safetensors reports a full disk as text: "... (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error)) from error
    else:
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
