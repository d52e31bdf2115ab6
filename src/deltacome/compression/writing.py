"""The last step of a compression: an artifact put together from finished weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilt import Rebuilt
from deltacome.compression.journal import Journal
from deltacome.errors import DeltacomeError
from deltacome.files import sha256, shard_names, shards, write_safetensors
from deltacome.format.artifact import Artifact
from deltacome.format.card import model_card
from deltacome.format.entries import WeightEntry, linear_ratio
from deltacome.format.manifest import (
    CHILD_VERSION,
    FORMAT_VERSION,
    MODEL_CARD,
    SKETCH_VERSION,
    WEIGHTS,
    travelling_file_name,
    write_manifest,
)
from deltacome.version import __version__

SHARD_BYTES = 5 * 10**9


def check_names(base: Checkpoint, finetuned: Checkpoint) -> None:
    """See before the work that the files which travel with the model can be read, and that all names can be written.

    Raises:
        DeltacomeError: if not.
    """
    for checkpoint in (base, finetuned):
        try:
            checkpoint.name.encode()
        except UnicodeEncodeError as error:
            raise DeltacomeError(f"the folder's name {checkpoint.name!a} is no UTF-8; rename it") from error
    for name in finetuned.tensors:
        if not name.isprintable():
            raise DeltacomeError(f"{finetuned.source} has a tensor {name!a}, whose name cannot be printed")
    for path in finetuned.sidecars():
        try:
            travelling_file_name(path.name)
            sha256(path)
            base.sidecar_digest(path.name)
        except ValueError as error:
            raise DeltacomeError(f"{path} cannot be in an artifact: {error}; rename or remove it") from error
        except OSError as error:
            raise DeltacomeError(f"{error.filename} cannot be read: {error.strerror}") from error


def write_artifact(
    journal: Journal,
    base: Checkpoint,
    finetuned: Checkpoint,
    method: dict[str, Any],
    check: Callable[[Artifact], None],
) -> None:
    """Write the journal's weights as an artifact in its folder, and give that its name when it is complete.

    Args:
        base: what the weights are deltas on; if that is rebuilt from a delta, this is the artifact's parent.
        method: the method and its settings, as the manifest has them.
        check: raises if the artifact is not what was asked for; it does not get its name then.
    """
    folder = journal.work.path / "artifact"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = [journal.entries[name] for name in sorted(journal.entries)]
    files = _write_weights(folder, entries, journal)
    weight_bytes = sum((folder / file).stat().st_size for file in files)
    base_files = {}
    for path in finetuned.sidecars():
        digest = sha256(path)
        if digest == base.sidecar_digest(path.name):
            base_files[path.name] = digest
        else:
            shutil.copyfile(path, folder / path.name)
            files[path.name] = digest
    root, parent = (base.base, base.artifact) if isinstance(base, Rebuilt) else (base, None)
    version = FORMAT_VERSION if parent is None else CHILD_VERSION
    manifest: dict[str, Any] = {
        "format_version": SKETCH_VERSION if any(entry.sketched for entry in entries) else version,
        "deltacome": __version__,
        "method": method,
        "base": {"name": root.name, "fingerprint": root.fingerprint()},
        "finetuned": {"name": finetuned.name},
        "finetuned_bytes": 2 * finetuned.elements,
        "linear_ratio": round(linear_ratio(entries), 3),
        "files": files,
        "base_files": base_files,
        "weights": {entry.name: entry.fields() for entry in entries},
    }
    if isinstance(base, Rebuilt):
        manifest["parent"] = {"name": base.delta_name, "sha256": base.artifact.manifest["sha256"]}
    write_manifest(folder, manifest, weight_bytes)
    artifact = Artifact(folder, parent)
    check(artifact)
    (folder / MODEL_CARD).write_text(model_card(artifact), encoding="utf-8")
    journal.work.publish(folder)


def _write_weights(folder: Path, entries: list[WeightEntry], journal: Journal) -> dict[str, str]:
    """Write the weight files; their SHA-256 by name."""
    specs = {name: spec for entry in entries for name, spec in entry.tensors().items()}
    # Larger items first keeps every tensor aligned to its item size.
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    sizes = {name: specs[name][0].itemsize * torch.Size(specs[name][1]).numel() for name in order}
    runs = shards(sizes, SHARD_BYTES)
    return {
        file: write_safetensors(folder / file, {name: specs[name] for name in names}, journal.read)
        for file, names in zip(shard_names(WEIGHTS, len(runs)), runs, strict=True)
    }
