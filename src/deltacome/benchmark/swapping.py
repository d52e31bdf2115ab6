"""What `benchmark serve` compares with: merged models on the same server, one in memory at a time."""

import gc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.format.artifact import Artifact
from deltacome.runtime.model import share
from deltacome.runtime.tenant import Tenant
from deltacome.serve.engine.attention import share_keys
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.engine.sequence import Sequence
from deltacome.serve.http.keys import Keys
from deltacome.serve.http.service import Service
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import Loaded, Registry


class SwappingEngine(Engine):
    """The engine with one model in memory at a time.

    It takes every sequence of that model that waits or comes, until the oldest of the others has waited for `patience`
    seconds; then it finishes what runs and loads the oldest's model. from_disk: the operating system keeps no copy of
    a checkpoint in memory that the server does not count.
    """

    def __init__(
        self, model: Any, merged: Mapping[str, Path], metrics: Metrics, patience: float, from_disk: bool
    ) -> None:
        super().__init__(model, Limits())
        self.merged, self.metrics, self.patience, self.from_disk = merged, metrics, patience, from_disk
        self.current: str | None = None
        self.came: dict[Sequence, float] = {}

    def submit(self, sequences: list[Sequence]) -> None:
        self.came.update(dict.fromkeys(sequences, time.monotonic()))
        super().submit(sequences)

    def _admit(self) -> None:
        with self.lock:
            others = [sequence for sequence in self.waiting if _name(sequence) != self.current]
            has_own = len(others) < len(self.waiting)
        oldest = min(others, key=lambda sequence: self.came.get(sequence, 0.0), default=None)
        is_late = oldest is not None and time.monotonic() - self.came.get(oldest, 0.0) > self.patience
        if oldest is not None and not self.batches and not self.reading and (is_late or not has_own):
            self._swap(_name(oldest))
            is_late = False

        def joins(sequence: Sequence) -> bool:
            if _name(sequence) != self.current or is_late or not self._has_room(sequence):
                return False
            self._take(sequence)
            self.came.pop(sequence, None)
            return True

        with self.lock:
            self.waiting.drop(joins)

    def _swap(self, name: str | None) -> None:
        from transformers import AutoModelForCausalLM

        assert name is not None
        self.model = None
        gc.collect()
        if self.from_disk and self.current is not None:
            _forget_pages(self.merged[self.current])
        self.model = AutoModelForCausalLM.from_pretrained(
            self.merged[name], dtype=torch.float32, trust_remote_code=False
        ).eval()
        share(self.model, None)
        share_keys(self.model)
        self.current = name
        self.metrics.loads.labels(name).inc()


def _forget_pages(folder: Path) -> None:
    """Let the operating system drop the files of a checkpoint from its cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _name(sequence: Sequence) -> str | None:
    return None if sequence.tenant is None else sequence.tenant.name


class _Names(Registry):
    """The deltas as names alone, with their tokenizers; the weights are the merged models'."""

    def _read(self, name: str, folder: Path) -> Loaded:
        return self._loaded(Tenant(name, Artifact(folder), {}))


def build_swapping(
    base: str,
    deltas: Mapping[str, Path],
    merged: Mapping[str, Path],
    *,
    patience: float,
    from_disk: bool,
    chat_template: str | None,
) -> Service:
    """The server's service over merged checkpoints."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(base)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, trust_remote_code=False).eval()
    share(model, checkpoint)
    metrics = Metrics()
    registry = _Names(model, checkpoint, checkpoint.name, metrics, chat_template=chat_template)
    for name, folder in deltas.items():
        registry.add(name, folder)
        registry.preload(name)
    if from_disk:
        for folder in merged.values():
            _forget_pages(folder)
    longest = model.config.get_text_config().max_position_embeddings
    engine = SwappingEngine(model, merged, metrics, patience, from_disk)
    return Service(engine, registry, metrics, Keys(None, None), longest, deadline=3600.0)
