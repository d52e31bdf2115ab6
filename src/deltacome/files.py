"""Files: hashing, files that appear only when complete, and safetensors written as a stream."""

import errno
import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltacome.errors import DeltacomeError

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

# Files that belong to a model besides its weights.
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
)
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecars_in(folder: Path) -> list[Path]:
    """The files in a folder that belong to a model besides its weights, by name; of code what the model is made of.

    Raises:
        DeltacomeError: if one of them cannot be read.
    """
    code = _code_in(folder)
    found = []
    for path in sorted(folder.iterdir()):
        is_named = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SIDECARS)
        # Copies by hand and what macOS leaves on foreign disks ("tokenizer copy.json", "._x.jinja") are nobody's.
        is_odd = PLAIN_NAME.fullmatch(path.name) is None or path.name.endswith(".index.json")
        if not is_named or is_odd or not path.is_file() or (path.suffix == ".py" and path.stem not in code):
            continue
        if not os.access(path, os.R_OK):
            raise DeltacomeError(f"{path} cannot be read; it belongs to the model, change its permissions")
        found.append(path)
    return found


def _code_in(folder: Path) -> set[str]:
    """The modules of a folder that the model's configuration names (`auto_map`), and those that they import."""
    named: list[str] = []
    for path in filter(Path.is_file, folder.glob("*config.json")):
        try:
            classes = list(json.loads(path.read_text(encoding="utf-8"))["auto_map"].values())
        except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
            continue  # no JSON, or none with such a map
        named += [
            str(name).rpartition(".")[0] for item in classes for name in (item if isinstance(item, list) else [item])
        ]
    found: set[str] = set()
    while named:
        name = named.pop()
        path = folder / f"{name}.py"
        if name in found or PLAIN_NAME.fullmatch(path.name) is None or not path.is_file():
            continue
        found.add(name)
        if os.access(path, os.R_OK):
            named += RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
    return found


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn the operating system's errors, a full disk above all, into one sentence: "cannot `action`: why"."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DeltacomeError(f"cannot {action}: the disk is full; free some space and start again") from error
        where = f" ({error.filename})" if error.filename else ""
        raise DeltacomeError(f"cannot {action}: {error.strerror or error}{where}") from error


def sync(path: Path) -> None:
    """Flush a file, or what a folder lists, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name, flushed to disk, when the block ends well: a kill leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file in one step, as `new_file` does."""
    with new_file(path) as file:
        file.write(content)


def check_writable(path: Path) -> None:
    """See before the work whether a file of that name can be written at its end.

    Raises:
        DeltacomeError: if its folder is missing, or nothing can be written there.
    """
    if not path.absolute().parent.is_dir():
        raise DeltacomeError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise DeltacomeError(f"cannot write {path}: it is a folder; name a file")
    with disk_errors(f"write {path}"):
        trial = path.with_name(f".{path.name}.tmp")
        trial.touch()
        trial.unlink()


def write_safetensors(
    path: Path, tensors: dict[str, tuple[torch.dtype, list[int]]], read: Callable[[str], Tensor]
) -> str:
    """Write a safetensors file tensor by tensor, so that no more than one is in memory; returns its SHA-256.

    The file is there when it is complete, and not before.

    Args:
        tensors: dtype and shape by name, in the order of the file.
        read: gives the tensor of a name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with new_file(path) as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            file.write(chunk)
            digest.update(chunk)
        for name, (dtype, shape) in tensors.items():
            data = raw(read(name))
            assert data.nbytes == dtype.itemsize * math.prod(shape), name
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Split names into runs of at most `limit` bytes each; a tensor larger than that has a run of its own."""
    runs: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if runs[-1] and total + size > limit:
            runs.append([])
            total = 0
        runs[-1].append(name)
        total += size
    return runs


def shard_names(stem: str, count: int) -> list[str]:
    """File names as the Hub has them: `stem.safetensors`, or `stem-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
