"""The work folder of a compression that is under way: each finished weight in a file of its own.

A killed run leaves the folder behind, hidden beside its output; the same command started again goes on from it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import write_atomically
from deltacome.format.manifest import WeightEntry


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
        self.folder, self.lock = claim(out)
        self.store = Store(self.folder)
        self.files: dict[str, Path] = {}
        self.entries: dict[str, WeightEntry] = {}
        try:
            self._open(job)
        except OSError:
            self.close(remove=True)
            raise

    def _open(self, job: dict[str, Any]) -> None:
        """Take up what the same job has left, and clear away anything else."""
        description = self.folder / "job.json"
        text = json.dumps(job, sort_keys=True)
        if not description.is_file() or description.read_text() != text:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_atomically(description, text.encode())
        for path in self.folder.glob("*.safetensors"):
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
        except SafetensorError:
            path.unlink()  # torn by a power cut; the weight is done again
            return
        name = metadata["name"]
        self.files[name], self.entries[name] = path, WeightEntry.parse(name, json.loads(metadata["fields"]))

    def add(self, name: str) -> WeightEntry:
        """Take up a weight that has been stored."""
        self._load(self.store.path(name))
        return self.entries[name]

    def read(self, tensor: str) -> Tensor:
        """A tensor of a finished weight, by its name in the artifact."""
        with safe_open(self.files[tensor.rpartition(".")[0]], "pt") as file:
            return file.get_tensor(tensor)

    def close(self, remove: bool) -> None:
        """Let go of the folder, for another run to go on from unless it is removed."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()


def work_folder(out: Path) -> Path:
    """Where an output is made."""
    return out.absolute().with_name(f".{out.name}.partial")


def claim(out: Path) -> tuple[Path, FileLock]:
    """Make the folder where an output is made, and lock it.

    Raises:
        DeltacomeError: if another process is making the same output.
    """
    folder = work_folder(out)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DeltacomeError(f"another process is writing {out}; wait for it or choose another name") from error
    return folder, lock


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
    partial.rename(path)
