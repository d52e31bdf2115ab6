"""A checkpoint's weight files: which of those in a folder count, and what is in them."""

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import TORCH_DTYPES
from deltacome.progress import print_warning

# In the order in which transformers looks for them.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT takes the first that is there
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

warn_once = cache(print_warning)  # a checkpoint may be opened several times in a command


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and its shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        DeltacomeError: if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise DeltacomeError(f"{path.parent} has no {path.name}; is it a Hugging Face checkpoint?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DeltacomeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DeltacomeError(f"{path} does not hold a JSON object")
    return content


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's own weights, an adapter's left out."""
    return any((folder / name).is_file() for name in NAMES) or bool(_shards(folder))


def tensors_in(folder: Path, explicit: str | None = None) -> dict[str, TensorInfo]:
    """A model's weights by name, from the files that transformers takes; shards without an index too.

    Warns if there is a choice.

    Args:
        explicit: the file or index that the configuration names (`transformers_weights`).

    Raises:
        DeltacomeError: if there are none, some are missing or broken, or there is an adapter beside them.
    """
    if (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise DeltacomeError(
            f"{folder} holds a whole model and an adapter, which transformers would put on it; move the adapter into a "
            "folder of its own"
        )
    found = [name for name in NAMES if (folder / name).is_file()] if explicit is None else [Path(explicit).name]
    if len(found) > 1:
        warn_once(
            f"{folder} holds {' and '.join(found)}; the weights are read from {found[0]}, as transformers does: "
            "remove what is stale"
        )
    if not found:
        return _in_files(_shards(folder) or _nothing_in(folder))
    chosen = folder / found[0]
    if not chosen.is_file():
        raise DeltacomeError(f"{folder} lacks {chosen.name}, which its config.json names; download it again")
    return _of_index(chosen) if chosen.suffix == ".json" else header(chosen)


def _in_files(files: Iterable[Path]) -> dict[str, TensorInfo]:
    return {name: info for file in files for name, info in header(file).items()}


def _of_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DeltacomeError(f"{index} names no weights; download it again")
    files = [index.parent / Path(str(name)).name for name in sorted(set(map(str, weight_map.values())))]
    for file in files:
        if not file.is_file():
            raise DeltacomeError(f"{index.parent} lacks {file.name}, which its index names; download it again")
    found = _in_files(files)
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise DeltacomeError(
            f"{index} names {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which its files have "
            "not; they are another checkpoint's, download them again"
        )
    return found


def _shards(folder: Path) -> list[Path]:
    """The shards of a model whose index is missing."""
    parts = [(path, SHARD.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors"))]
    found = [(path, part) for path, part in parts if part and not part["stem"].startswith(("consolidated", "adapter"))]
    if found and len({(part["stem"], part["count"]) for _, part in found}) > 1:
        names = ", ".join(sorted({f"{part['stem']}-*-of-{part['count']}" for _, part in found}))
        raise DeltacomeError(f"{folder} holds shards of several checkpoints ({names}) and no index; keep one's")
    if found and len(found) != int(found[0][1]["count"]):
        raise DeltacomeError(f"{folder} holds {len(found)} of {int(found[0][1]['count'])} shards; download it again")
    return [path for path, _ in found]


def _nothing_in(folder: Path) -> list[Path]:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    found = f"; {others[0]} is not where transformers looks, rename it if it is the model" if others else ""
    raise DeltacomeError(f"{folder} has no weights (model.safetensors, its shards, or pytorch_model.bin){found}")


def header(file: Path) -> dict[str, TensorInfo]:
    """What a file holds, by name.

    Raises:
        DeltacomeError: if it is broken, or holds something else than tensors that are whole.
    """
    found = _bin_header(file) if file.suffix == ".bin" else _safetensors_header(file)
    for name, info in found.items():
        if 0 in info.shape and (name.endswith(".weight") or "lora_" in name):
            raise DeltacomeError(
                f"{name} in {file} is empty: DeepSpeed ZeRO-3 or FSDP saved it before the weights were gathered; "
                "make whole weights from the training's checkpoint (zero_to_fp32.py) and take those"
            )
    return found


def read_tensor(file: Path, name: str, index: int | None = None) -> Tensor:
    """One tensor, or the matrix of that number of a stack. The file is opened for it alone: nothing stays mapped."""
    if file.suffix == ".bin":
        tensor = _load_bin(file)[name]
        return tensor if index is None else tensor[index]
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index : index + 1][0]
    except (SafetensorError, OSError) as error:
        raise DeltacomeError(f"cannot read {name} from {file}: {error}") from error


def stamp(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of each file: enough to see that it is the one from before."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(set(files))]


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


def _bin_header(path: Path) -> dict[str, TensorInfo]:
    return {name: TensorInfo(path, tuple(tensor.shape), tensor.dtype) for name, tensor in _load_bin(path).items()}


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`; nothing else in it is ever run."""
    if not zipfile.is_zipfile(path):
        raise DeltacomeError(
            f"{path} is damaged, or in the format that PyTorch had before 1.6; load it in PyTorch and save it as "
            "safetensors"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen unrelated types here
        reason = re.sub(r"\s+", " ", str(error))[:150]
        raise DeltacomeError(
            f"{path} cannot be loaded as plain weights, so it is not loaded at all, since other objects may run code; "
            f"save it as safetensors where you trust it ({reason})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DeltacomeError(f"{path} does not hold tensors by name alone; save the model's state_dict as safetensors")
    return content
