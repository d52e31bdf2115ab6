"""Rebuild a fine-tuned model from its base and a compressed delta, on disk or in memory."""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deltacome.checkpoints.architectures import auto_class
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import check_base, check_shapes, rebuild_stored, sidecars
from deltacome.errors import DeltacomeError, reason
from deltacome.files import shard_names, shards, write_safetensors
from deltacome.format.artifact import Artifact
from deltacome.hub import UNFIT_FILES
from deltacome.language import load_tokenizer
from deltacome.outputs import new_folder, refuse_existing
from deltacome.progress import bar, each
from deltacome.version import __version__

SHARD_BYTES = 5 * 10**9
OF_THE_FILES = ("quantization_config", "compression_config", "transformers_weights")  # in config.json, not the model's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(base: str | Path, delta: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the rebuilt checkpoint, tensor by tensor, to the folder `out`.

    Args:
        dtype: of the floating-point weights; the fine-tuned checkpoint's own by default. Rounding to 16 bit costs
            some of the delta; `torch.float32` keeps all of it.

    Returns:
        `folder` and `bytes`.

    Raises:
        DeltacomeError: on a broken artifact, another base, or an output that exists; nothing is left behind then. After
            anything else that ends it early the same call goes on from the files that are finished.
    """
    out = Path(out)
    refuse_existing(out)
    checkpoint = Checkpoint(base)
    artifact = open_checked(checkpoint, delta)
    specs = {}
    for name, (first, *_) in artifact.stored.items():
        own = dtype if dtype is not None and first.dtype.is_floating_point else first.dtype
        specs[name] = (own, artifact.stored_shape(name))
    sizes = {name: d.itemsize * math.prod(shape) for name, (d, shape) in specs.items()}
    runs = shards(sizes, SHARD_BYTES)
    files = shard_names("model", len(runs))
    job = {"merge": str(dtype), **job_of(checkpoint, artifact)}
    with new_folder(out, job) as folder, bar("merging", len(specs)) as advance:

        def read(name: str) -> torch.Tensor:
            advance(1)
            return rebuild_stored(name, artifact, checkpoint, dtype)

        for file, names in zip(files, runs, strict=True):
            if (folder / file).exists():  # finished by a run that was interrupted
                advance(len(names))
            else:
                write_safetensors(folder / file, {name: specs[name] for name in names}, read)
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, runs, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        copy_sidecars(artifact, checkpoint, folder)
    return {"folder": str(out), "bytes": sum(path.stat().st_size for path in out.iterdir())}


def job_of(base: Checkpoint, artifact: Artifact) -> dict[str, Any]:
    """Everything that what is made of a delta depends on, see `outputs.WorkFolder`."""
    return {"deltacome": __version__, "base": base.stamp(), "artifact": artifact.manifest["sha256"]}


def open_checked(base: Checkpoint, delta: str | Path) -> Artifact:
    """Open an artifact and check all of its digests (once a process), and that the base is its own, of its shapes.

    Raises:
        DeltacomeError: on a broken artifact or another base.
    """
    artifact = Artifact(delta)
    artifact.check_files()
    check_base(artifact, base)
    check_shapes(artifact, base)
    config = artifact.sidecars().get("config.json")
    if config is not None:
        _settings(config)  # refused before the work, if it is broken
    return artifact


def copy_sidecars(artifact: Artifact, base: Checkpoint, folder: Path) -> None:
    """Put the fine-tuned model's tokenizer and configuration files, of weights not quantized, into a folder."""
    for name, path in sidecars(artifact, base).items():
        shutil.copyfile(path, folder / name)
    config = folder / "config.json"
    settings = _settings(config)
    kept = {key: value for key, value in settings.items() if key not in OF_THE_FILES}
    if kept != settings:
        config.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def _settings(config: Path) -> dict[str, Any]:
    """What is in a model's configuration, nothing if there is none.

    Raises:
        DeltacomeError: if it is no JSON object.
    """
    if not config.is_file():
        return {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            return settings
        reason = "it is no object"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise DeltacomeError(f"{config} is broken: {reason}; fetch or compress the delta again")


def load_merged(base: Checkpoint, artifact: Artifact, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The rebuilt model, in evaluation mode, and its tokenizer, without writing the weights to disk.

    The weights are those of `merge(..., dtype=dtype)`, bit for bit. The artifact is one from `open_checked`.

    Raises:
        DeltacomeError: if transformers does not know the architecture.
    """
    weights = {}
    with bar("rebuilding", len(artifact.stored)) as advance:
        for name in each(artifact.stored, advance):
            weights[name] = rebuild_stored(name, artifact, base, dtype)
    with TemporaryDirectory() as temporary:
        copy_sidecars(artifact, base, Path(temporary))
        model = model_of(weights, Path(temporary), f"the model of {artifact.folder}", dtype)
        tokenizer = load_tokenizer(str(artifact.folder), Path(temporary), base.folder)
    return model, tokenizer


def model_of(weights: dict[str, torch.Tensor], folder: Path, what: str, dtype: torch.dtype) -> Any:
    """A model of weights by a checkpoint's names, in evaluation mode, as the configuration files in a folder have it.

    Args:
        what: what errors call it.

    Raises:
        DeltacomeError: if transformers does not know the architecture.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architecture = auto_class(config.model_type)._model_mapping[type(config)]
        model = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except UNFIT_FILES as error:
        raise DeltacomeError(f"transformers cannot load {what}: {reason(error)}") from error
    return model.eval()
