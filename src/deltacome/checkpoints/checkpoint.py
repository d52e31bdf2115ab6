"""Hugging Face checkpoints, read a tensor at a time, and the pairing of a base with a fine-tuned one."""

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.quantized import find_quantized
from deltacome.checkpoints.weight_files import TensorInfo, read_json, read_tensor, stamp, tensors_in, warn_once
from deltacome.errors import BadInputError, DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, SIDECARS, raw, sha256, sidecars_in
from deltacome.hub import locate, name_of
from deltacome.progress import bar
from deltacome.weights import INPUT_EMBEDDINGS, VALUE_HEAD, is_buffer, is_matrix, split_stack, unwrapped

SAFE_ON_HUB = [*SIDECARS, "adapter_config.json", "*.safetensors", "*.safetensors.index.json"]
BIN_ON_HUB = [*SIDECARS, "adapter_config.json", "*_model*.bin", "pytorch_model.bin.index.json"]


def locate_checkpoint(source: str | Path) -> Path:
    """The folder of a checkpoint or an adapter, see `locate`; from the hub `.bin` only where there is nothing else."""
    return locate(str(source), SAFE_ON_HUB, BIN_ON_HUB)


class Checkpoint:
    """A checkpoint folder: its weights by name, read on demand, its configuration and the files beside the weights.

    A stack (k, m, n), the weights of k experts, counts as so many matrices: `experts.down_proj[0]` and so on. Quantized
    weights are read as what they stand for. Names are without what wrappers of the model put in (`module.`,
    `_orig_mod.`); buffers that models compute by now, and value heads, are no weights.

    Raises:
        DeltacomeError: if the folder is missing, holds no weights, or its files are broken.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.folder = locate_checkpoint(source)
        self.config = read_json(self.folder / "config.json")
        self.sidecars()  # one that cannot be read is found out before the work
        self._fingerprint: str | None = None
        self._stored: dict[str, TensorInfo] = {}
        self._names: dict[str, str] = {}  # in the files, by those without wrappers
        for name, info in tensors_in(self.folder, self.config.get("transformers_weights")).items():
            if unwrapped(name) in self._stored:
                raise DeltacomeError(f"{self.source} holds {unwrapped(name)} twice, once as {name}; keep one of them")
            self._names[unwrapped(name)] = name
            self._stored.update(_matrices(unwrapped(name), info))
        self.quantized = find_quantized(self.source, self.config, self._stored, self._read_stored)
        hidden = {part for weight in self.quantized.values() for part in weight.stored}
        value_head = {name for name in self._stored if name.startswith(VALUE_HEAD)}
        if value_head:
            warn_once(f"{self.source} has a value head ({min(value_head)}), which is left out: models do without")
        hidden |= value_head | {name for name, info in self._stored.items() if is_buffer(name, info.shape)}
        self.tensors = {name: info for name, info in self._stored.items() if name not in hidden}
        for name, weight in self.quantized.items():
            stored = self._stored[name]
            self.tensors[name] = replace(stored, shape=weight.shape or stored.shape, dtype=weight.dtype)

    @property
    def name(self) -> str:
        """The hub id, or the folder's name: nothing that only means something on this machine."""
        return name_of(self.source, self.folder)

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
        stored, index = split_stack(name)
        return read_tensor(self._stored[name].file, self._names[stored], index)

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

    def rows_to_add_to(self, name: str) -> int:
        """How many of a weight's rows, the first ones, a delta can add to."""
        shape = self.tensors[name].shape
        return shape[0] if shape else 0

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
            lines = hashlib.sha256()
            with bar(f"hashing {self.folder.name}", sum(info.elements for info in self._stored.values())) as advance:
                for name, info in sorted(self._stored.items()):
                    shape = "x".join(map(str, info.shape))
                    content = hashlib.sha256(raw(self._read_stored(name))).hexdigest()
                    lines.update(f"{name} {SAFETENSORS_DTYPES[info.dtype]} {shape} {content}\n".encode())
                    advance(info.elements)
            self._fingerprint = lines.hexdigest()
        return self._fingerprint

    def stamp(self) -> list[Any]:
        """What its weights are made of: enough to see that a checkpoint is the one from before."""
        return [*stamp(info.file for info in self._stored.values()), digest(self.config)]

    @cached_property
    def input_embedding(self) -> str | None:
        """Name of the input embedding."""
        return next((name for name in self.tensors if name.endswith(INPUT_EMBEDDINGS)), None)


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _matrices(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """A weight by its name, or the matrices of a stack by theirs."""
    if len(info.shape) != 3 or not is_matrix(info.shape[1:]):
        return {name: info}
    return {f"{name}[{i}]": replace(info, shape=info.shape[1:]) for i in range(info.shape[0])}
