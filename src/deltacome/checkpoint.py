"""Hugging Face checkpoints, read a tensor at a time, and the pairing of a base with a fine-tuned one."""

import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, raw, sha256
from deltacome.hub import locate
from deltacome.progress import bar
from deltacome.quantised import find_quantised

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
ON_HUB = ["*.safetensors", "*.safetensors.index.json", *SIDECARS, "adapter_config.json"]
SMALLEST_SIDE = 16  # of a matrix that is worth factors
# The last part of a module's name that marks it as an embedding or a language-model head.
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "embed_in", "embed_out", "lm_head", "word_embeddings", "embeddings"}
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


def sidecars_in(folder: Path) -> list[Path]:
    """The files in a folder that belong to a model besides its weights, by name."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.endswith(".index.json"))
    return sorted(path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in SIDECARS))


def is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of an embedding or a language-model head."""
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def module_kind(name: str) -> str:
    """A weight's name with the numbers of its layer and expert left out: `model.layers.*.mlp.up_proj.weight`."""
    return re.sub(r"\.\d+\.", ".*.", split_stack(name)[0])


def split_stack(name: str) -> tuple[str, int | None]:
    """The name of the stack that a matrix is part of, and its number there; the name itself and None if of none."""
    found = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, None)


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

    A stack (k, m, n), the weights of k experts, counts as so many matrices: `experts.down_proj[0]` and so on. Quantised
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
        self.quantised = find_quantised(self.source, self.config, self._stored, self._read_stored)
        hidden = {part for weight in self.quantised.values() for part in weight.stored}
        self.tensors = {name: info for name, info in self._stored.items() if name not in hidden}
        for name, weight in self.quantised.items():
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
        if name in self.quantised:
            return self.quantised[name].read(self._read_stored).to(self.tensors[name].dtype)
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
        if name in self.quantised:
            tensor = self.quantised[name].read(self._read_stored)
        else:
            tensor = self._read_stored(name).to(torch.float32, copy=True)
        self.check_finite(name, tensor)
        return tensor

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise DeltacomeError if the values, in float32, of the tensor of that name hold NaN or infinity."""
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise DeltacomeError(f"{name} in {self.source} holds NaN or infinity; the checkpoint is broken")

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


@dataclass(frozen=True)
class Pair:
    """One weight of the fine-tuned checkpoint and the base's counterpart.

    base_name: None where the base has none. rows: leading rows that both have.
    """

    name: str
    base_name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int

    @property
    def is_matrix(self) -> bool:
        """Whether a method compresses it: a floating-point matrix of some size with a counterpart in the base."""
        return self.base_name is not None and self.dtype.is_floating_point and is_matrix(self.shape)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Two dimensions, neither so small that factors would save nothing."""
    return len(shape) == 2 and min(shape) >= SMALLEST_SIDE


def pair(base: Checkpoint, finetuned: Checkpoint, renames: Mapping[str, str] | None = None) -> list[Pair]:
    """Match the weights of the two checkpoints by name.

    More or fewer rows than in the base (another vocabulary) and an output embedding that the base ties are understood,
    and so is a vision-language model on a plain language model: its language tower's names begin otherwise.

    Args:
        renames: beginnings of names in the fine-tuned checkpoint, and what stands for them in the base's. Without it
            such a beginning is looked for where it is needed.

    Raises:
        DeltacomeError: if the architectures or shapes are not those of a base and its fine-tune.
    """
    kinds = [checkpoint.config.get("model_type") for checkpoint in (base, finetuned)]
    text = finetuned.config.get("text_config")
    if renames is None and kinds[0] != kinds[1]:
        if not isinstance(text, dict) or text.get("model_type") != kinds[0]:
            raise DeltacomeError(
                f"{finetuned.source} is a {kinds[1]} model and {base.source} a {kinds[0]} model; is this the right "
                "base? If it is, say how its names correspond to the base's (--map)"
            )
        renames = _found_renames(base, finetuned)
    pairs = []
    for name, info in sorted(finetuned.tensors.items()):
        base_name = _base_name(name, base, renames or {})
        if base_name is None and name.endswith(OUTPUT_EMBEDDINGS):
            base_name = base.input_embedding  # the base has no head of its own: it ties them
        rows = 0
        if base_name is not None:
            theirs = base.tensors[base_name].shape
            rows = min(theirs[0], info.shape[0]) if theirs and info.shape else 0
            other_vocabulary = is_embedding(name) and len(theirs) == 2 and theirs[1:] == info.shape[1:]
            if theirs != info.shape and not other_vocabulary:
                raise DeltacomeError(
                    f"{name} is {_by(info.shape)} in {finetuned.source} and {_by(theirs)} in {base.source}; "
                    "is this the right base?"
                )
        pairs.append(Pair(name, base_name, info.shape, info.dtype, rows))
    used = {p.base_name for p in pairs}
    # A fine-tune may lack an output embedding that it ties, and buffers that older versions saved.
    needed = (n for n, info in base.tensors.items() if is_matrix(info.shape) and not n.endswith(OUTPUT_EMBEDDINGS))
    missing = sorted(set(needed) - used)
    if missing or not any(p.is_matrix for p in pairs):
        what = f"{len(missing)} of its weights are not in" if missing else "it shares no weights with"
        example = f" ({missing[0]} is one)" if missing else ""
        raise DeltacomeError(
            f"{base.source} cannot be the base of {finetuned.source}: {what} the fine-tuned checkpoint{example}"
        )
    return pairs


def _base_name(name: str, base: Checkpoint, renames: Mapping[str, str]) -> str | None:
    """The base's name for a weight: by the longest beginning that is renamed, else the same."""
    for old in sorted(renames, key=len, reverse=True):
        renamed = renames[old] + name.removeprefix(old)
        if name.startswith(old) and renamed in base.tensors:
            return renamed
    return name if name in base.tensors else None


def _found_renames(base: Checkpoint, finetuned: Checkpoint) -> dict[str, str]:
    """The one change of a beginning that gives most weights of the same shape, those of the same name left out.

    Towers have layers of the same names, but fewer of them, and of other shapes.
    """
    ends: dict[str, list[str]] = {}
    for name in base.tensors:
        parts = name.split(".")
        for start in range(len(parts) - 1):
            ends.setdefault(".".join(parts[start:]), []).append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for name in finetuned.tensors.keys() - base.tensors.keys():
        parts = name.split(".")
        known = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
        end = next((end for end in known if end in ends), None)
        for other in ends.get(end or "", ()):
            if base.tensors[other].shape == finetuned.tensors[name].shape:
                counts[name.removesuffix(end or ""), other.removesuffix(end or "")] += 1
    return dict([max(counts, key=lambda found: counts[found])]) if counts else {}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


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
