"""A base plus a delta as a checkpoint: what the next delta is made on, and what a chain of them is flattened from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import check_base, check_shapes, rebuild, sidecars
from deltacome.checkpoints.weight_files import TensorInfo, read_json, stamp
from deltacome.files import sha256
from deltacome.format.artifact import Artifact
from deltacome.format.manifest import MANIFEST
from deltacome.hub import name_of


class Rebuilt(Checkpoint):
    """The fine-tuned model of a delta, its weights rebuilt when they are read; `base` and `artifact` are what from.

    Each file beside the weights is where the chain of deltas has it, `folder` being that of the configuration.

    Raises:
        DeltacomeError: if the delta is broken, or of another base.
    """

    def __init__(self, base: Checkpoint, delta: str | Path) -> None:
        self.source, self.base, self.artifact = str(delta), base, Artifact(delta)
        self.artifact.check_files()
        check_base(self.artifact, base)
        check_shapes(self.artifact, base)
        self.files = sidecars(self.artifact, base)
        self.folder = self.files.get("config.json", base.folder / "config.json").parent
        self.config = read_json(self.folder / "config.json")
        self.quantized = {}
        self._fingerprint = None
        file = self.artifact.folder / MANIFEST
        entries = self.artifact.weights.items()
        self.tensors = {name: TensorInfo(file, entry.shape, entry.dtype) for name, entry in entries}

    @property
    def name(self) -> str:
        """That of the fine-tuned model when its delta was made."""
        return str(self.artifact.manifest["finetuned"]["name"])

    @property
    def delta_name(self) -> str:
        """The delta's hub id, or its folder's name."""
        return name_of(self.source, self.artifact.folder)

    def read(self, name: str) -> Tensor:
        """One tensor, rounded to the dtype of the fine-tuned model."""
        return self._rebuilt(name).to(self.tensors[name].dtype)

    def read_float(self, name: str) -> Tensor:
        """One tensor as a float32 copy, not rounded before, checked for NaN and infinity."""
        tensor = self._rebuilt(name).to(torch.float32, copy=True)
        self.check_finite(name, tensor)
        return tensor

    def _rebuilt(self, name: str) -> Tensor:
        return rebuild(self.artifact.weights[name], self.artifact.terms(name), self.base)

    def rows_to_add_to(self, name: str) -> int:
        """Those before the exact ones, which replace whatever a sum comes to."""
        exact = self.artifact.weights[name].dense
        return super().rows_to_add_to(name) if exact is None else exact

    def sidecars(self) -> list[Path]:
        """The files that belong to the model besides its weights, by name."""
        return [self.files[name] for name in sorted(self.files)]

    def sidecar_digest(self, name: str) -> str | None:
        """SHA-256 of one such file, the base's where the model has none of that name; None if there is neither."""
        path = self.files.get(name, self.base.folder / name)
        return sha256(path) if path.is_file() else None

    def stamp(self) -> list[Any]:
        """What its weights are made of."""
        files = (file for artifact in self.artifact.chain for file in artifact.weight_files)
        return [self.base.stamp(), self.artifact.manifest["sha256"], stamp(files)]
