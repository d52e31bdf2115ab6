"""LoRA adapters as the fine-tuned side: a checkpoint whose weights are the base's plus the adapter's product."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.checkpoints.checkpoint import ON_HUB, Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.files import sidecars_in
from deltacome.hub import locate

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
}


def is_adapter(source: str | Path) -> bool:
    """Whether a folder or hub id is that of a PEFT adapter and no model."""
    folder = locate(str(source), ON_HUB)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


class Adapted(Checkpoint):
    """A base with a LoRA adapter, as if it had been merged: W + (alpha / r) B A (Hu et al., 2021).

    The weights have the base's dtype; `read_float` gives them unrounded. Tokenizer files are the adapter's where it has
    some. An adapter's whole tensors (`modules_to_save`, biases, embeddings below LoRA) take the base's place.

    Raises:
        DeltacomeError: if the adapter is broken, of another kind than LoRA, or does not fit the base.
    """

    def __init__(self, base: Checkpoint, source: str | Path) -> None:
        self.source, self.base, self.adapter = str(source), base, locate(str(source), ON_HUB)
        self.folder, self.config = base.folder, base.config
        self._fingerprint = None
        self.settings = _settings(self.adapter)
        self.factors: dict[str, dict[str, str]] = {}  # an adapter's tensors by kind, by the base's weight
        self.whole: dict[str, str] = {}  # the adapter's tensor that takes the place of the base's
        self.tensors = dict(base.tensors)
        path = self.adapter / WEIGHTS
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DeltacomeError(f"{path} cannot be read: {error}") from error
        for name, shape in shapes.items():
            self._place(name, shape)
        for weight, factors in self.factors.items():
            self._check(weight, factors, shapes)
        self._tie()

    @property
    def name(self) -> str:
        """The hub id, or the adapter folder's name."""
        return self.source if not Path(self.source).exists() else self.adapter.resolve().name

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.adapter if (self.adapter / "tokenizer_config.json").is_file() else self.folder

    def sidecars(self) -> list[Path]:
        """The adapter's files where it has them, else the base's."""
        found = {path.name: path for path in (*sidecars_in(self.folder), *sidecars_in(self.adapter))}
        return [found[name] for name in sorted(found)]

    def stamp(self) -> list[list[Any]]:
        """Name, size and time of every weight file."""
        file = self.adapter / WEIGHTS
        return [*super().stamp(), [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]]

    def read(self, name: str) -> Tensor:
        """One tensor, rounded to the base's dtype."""
        if name in self.factors or name in self.whole:
            return self.read_float(name).to(self.tensors[name].dtype)
        return self.base.read(name)

    def read_float(self, name: str) -> Tensor:
        """One tensor as a float32 copy, not rounded before, checked for NaN and infinity."""
        tensor = self._tensor(self.whole[name]).float() if name in self.whole else self.base.read_float(name)
        if name in self.factors:
            tensor += self._product(name)
        self.check_finite(name, tensor)
        return tensor

    def _product(self, weight: str) -> Tensor:
        factors = {kind: self._tensor(name).float() for kind, name in self.factors[weight].items()}
        module = re.sub(r"\.lora_.*", "", next(iter(self.factors[weight].values()))).removeprefix(PREFIX)
        if "embedding_a" in factors:
            product = (factors["embedding_b"] @ factors["embedding_a"]).T
            rank = factors["embedding_a"].shape[0]
        else:
            product, rank = factors["b"] @ factors["a"], factors["a"].shape[0]
            if self.settings.get("fan_in_fan_out"):
                product = product.T
        alpha = _of_pattern(self.settings.get("alpha_pattern") or {}, module, self.settings["lora_alpha"])
        return product * (alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank))

    def _tie(self) -> None:
        """Drop the factors of a head that the base ties, if they are the embedding's."""
        embedding = self.base.input_embedding
        for head in self.factors.keys() - self.base.tensors.keys():
            if embedding not in self.factors or not torch.allclose(
                self._product(head), self._product(embedding), atol=1e-6
            ):
                raise DeltacomeError(
                    f"{self.source} changes {head}, which {self.base.source} ties to its embedding, in another way; "
                    "merge it into a base with embeddings of their own and compress that"
                )
            del self.factors[head], self.tensors[head]

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.adapter / WEIGHTS, "pt") as file:
            return file.get_tensor(name)

    def _place(self, name: str, shape: tuple[int, ...]) -> None:
        """Find the base's weight that one of the adapter's tensors belongs to."""
        for suffix, kind in KINDS.items():
            if name.endswith(f".{suffix}"):
                weight = self._find(f"{name.removeprefix(PREFIX).removesuffix(f'.{suffix}')}.weight")
                self.factors.setdefault(weight, {})[kind] = name
                return
        plain = name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")
        weight = self._find(plain)
        if shape != self.tensors[weight].shape:
            if self.tensors[weight].shape[1:] != shape[1:]:
                raise DeltacomeError(f"{name} in {self.source} does not fit {weight} in {self.base.source}")
            self.tensors[weight] = replace(self.tensors[weight], shape=shape)  # a grown vocabulary
        self.whole[weight] = name

    def _find(self, weight: str) -> str:
        """The base's name for a weight: the same, or the one that ends or begins otherwise alone."""
        if weight in self.base.tensors:
            return weight
        found = [name for name in self.base.tensors if name.endswith(f".{weight}") or weight.endswith(f".{name}")]
        if not found and weight.endswith("lm_head.weight") and self.base.input_embedding is not None:
            self.tensors[weight] = self.base.tensors[self.base.input_embedding]
            return weight  # the base ties it
        if len(found) != 1:
            raise DeltacomeError(
                f"{self.source} changes {weight}, which {self.base.source} has not; is it the adapter's base?"
            )
        return found[0]

    def _check(self, weight: str, factors: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        pairs = {("a", "b"), ("embedding_a", "embedding_b")}
        if tuple(sorted(factors)) not in pairs:
            raise DeltacomeError(f"{self.source} has one of LoRA's two factors for {weight} alone; it is broken")
        (rank, n), (m, other) = (shapes[factors[kind]] for kind in sorted(factors))
        expected = self.base.tensors.get(weight, self.tensors[weight]).shape
        is_turned = "embedding_a" in factors or self.settings.get("fan_in_fan_out")
        if rank != other or ((n, m) if is_turned else (m, n)) != expected:
            raise DeltacomeError(
                f"{self.source} changes {weight} by {m} x {other} times {rank} x {n}, and it is "
                f"{' x '.join(map(str, expected))} in {self.base.source}; is it the adapter's base?"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, if it is of a kind that can be merged into weights."""
    path = folder / CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["lora_alpha"] = float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeltacomeError(f"{path} is no LoRA adapter's configuration: {error!r}") from error
    for key, is_so in (
        (f"of type {settings.get('peft_type')}", settings.get("peft_type") != "LORA"),
        ("with DoRA", settings.get("use_dora")),
    ):
        if is_so:
            raise DeltacomeError(f"{folder} is an adapter {key}; merge it with PEFT and compress the merged checkpoint")
    return settings


def _of_pattern(pattern: dict[str, float], module: str, default: float) -> float:
    """The value of the first key that the module's name ends with, as PEFT has it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
