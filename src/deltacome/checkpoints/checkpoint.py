"""Hugging Face checkpoints, read a tensor at a time, and the pairing of a base with a fine-tuned one."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.checkpoints.quantized import find_quantized
from deltacome.errors import BadInputError, DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, SIDECARS, TORCH_DTYPES, raw, sha256, sidecars_in
from deltacome.hub import locate
from deltacome.progress import bar
from deltacome.weights import INPUT_EMBEDDINGS, is_matrix, split_stack

ON_HUB = ["*.safetensors", "*.safetensors.index.json", *SIDECARS, "adapter_config.json"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and its shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class Checkpoint:
    """A checkpoint folder: its weights by name, read on demand, its configuration and the files beside the weights.

    A stack (k, m, n), the weights of k experts, counts as so many matrices: `experts.down_proj[0]` and so on. Quantized
    weights are read as what they stand for.

    Raises:
        DeltacomeError: if the folder is missing, holds no weights, or its files are broken.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.folder = locate(self.source, ON_HUB, [*SIDECARS, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
        self.config = _read_json(self.folder / "config.json")
        self._fingerprint: str | None = None
        self._stored: dict[str, TensorInfo] = {}
        for file in _weight_files(self.folder):
            header = _bin_header(file) if file.suffix == ".bin" else _safetensors_header(file)
            for name, info in header.items():
                self._stored.update(_matrices(name, info))
        self.quantized = find_quantized(self.source, self.config, self._stored, self._read_stored)
        hidden = {part for weight in self.quantized.values() for part in weight.stored}
        self.tensors = {name: info for name, info in self._stored.items() if name not in hidden}
        for name, weight in self.quantized.items():
            stored = self._stored[name]
            self.tensors[name] = replace(stored, shape=weight.shape or stored.shape, dtype=weight.dtype)

    @property
    def name(self) -> str:
        """The hub id, or the folder's name: nothing that only means something on this machine."""
        return self.source if not Path(self.source).exists() else self.folder.resolve().name

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.folder

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(info.elements for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in its dtype. The file is opened for this tensor alone, so nothing stays mapped."""
        if name in self.quantized:
            return self.quantized[name].read(self._read_stored).to(self.tensors[name].dtype)
        return self._read_stored(name)

    def _read_stored(self, name: str) -> Tensor:
        info = self._stored[name]
        stored, index = split_stack(name)
        if info.file.suffix == ".bin":
            tensor = _load_bin(info.file)[stored]
            return tensor if index is None else tensor[index]
        try:
            with safe_open(info.file, "pt") as file:
                return file.get_tensor(stored) if index is None else file.get_slice(stored)[index : index + 1][0]
        except (SafetensorError, OSError) as error:
            raise DeltacomeError(f"cannot read {name} from {info.file}: {error}") from error

    def read_float(self, name: str) -> Tensor:
        """One tensor as a float32 copy, checked for NaN and infinity."""
        if name in self.quantized:
            tensor = self.quantized[name].read(self._read_stored)
        else:
            tensor = self._read_stored(name).to(torch.float32, copy=True)
        self.check_finite(name, tensor)
        return tensor

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise DeltacomeError if the values, in float32, of the tensor of that name hold NaN or infinity."""
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise BadInputError(f"{name} in {self.source} holds NaN or infinity; the checkpoint is broken")

    def sidecars(self) -> list[Path]:
        """The files that belong to the model besides its weights, by name."""
        return sidecars_in(self.folder)

    def sidecar_digest(self, name: str) -> str | None:
        """SHA-256 of one such file, None if there is none."""
        path = self.folder / name
        return sha256(path) if path.is_file() else None

    def fingerprint(self) -> str:
        """SHA-256 over a line per stored tensor, in the order of names: name, dtype, shape, SHA-256 of the bytes.

        Reads the whole checkpoint the first time.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            with bar(f"hashing {self.folder.name}", sum(info.elements for info in self._stored.values())) as advance:
                for name, info in sorted(self._stored.items()):
                    shape = "x".join(map(str, info.shape))
                    content = hashlib.sha256(raw(self._read_stored(name))).hexdigest()
                    digest.update(f"{name} {SAFETENSORS_DTYPES[info.dtype]} {shape} {content}\n".encode())
                    advance(info.elements)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def stamp(self) -> list[list[Any]]:
        """Name, size and time of every weight file: enough to see that a checkpoint is the one from before."""
        files = sorted({info.file for info in self.tensors.values()})
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    @cached_property
    def input_embedding(self) -> str | None:
        """Name of the input embedding."""
        return next((name for name in self.tensors if name.endswith(INPUT_EMBEDDINGS)), None)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DeltacomeError(f"{path.parent} has no {path.name}; is it a Hugging Face checkpoint?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeltacomeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DeltacomeError(f"{path} does not hold a JSON object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map", {})
            files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
            for file in files:
                if not file.is_file():
                    raise DeltacomeError(f"{folder} lacks {file.name}, which its index names; download it again")
            return files
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise DeltacomeError(f"{folder} has no weights (model.safetensors, its shards, or pytorch_model.bin)")
    return files


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in TORCH_DTYPES:
                    raise DeltacomeError(f"{name} in {path} has dtype {part.get_dtype()}, which is not supported")
                found[name] = TensorInfo(path, tuple(part.get_shape()), TORCH_DTYPES[part.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise DeltacomeError(f"{path} is damaged or no safetensors file: {error}") from error
    return found


def _matrices(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """A weight by its name, or the matrices of a stack by theirs."""
    if len(info.shape) != 3 or not is_matrix(info.shape[1:]):
        return {name: info}
    return {f"{name}[{i}]": replace(info, shape=info.shape[1:]) for i in range(info.shape[0])}


def _bin_header(path: Path) -> dict[str, TensorInfo]:
    return {name: TensorInfo(path, tuple(tensor.shape), tensor.dtype) for name, tensor in _load_bin(path).items()}


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen unrelated types here
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"{path} cannot be loaded as plain weights: {reason}") from error
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
