"""Weights that a checkpoint has quantized, as they are when they are computed with."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.errors import DeltacomeError

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class FourBit:
    """A matrix that bitsandbytes has quantized to 4 bit. parts: the checkpoint's names by those of its state."""

    name: str
    parts: dict[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored(self) -> set[str]:
        """The names of the tensors that it is stored in."""
        return {self.name, *self.parts.values()}

    def read(self, read: Read) -> Tensor:
        """The matrix, in float32."""
        from bitsandbytes.functional import dequantize_4bit

        state = _state(self.parts, read)
        state.dtype = torch.float32  # or it would be rounded
        found: Tensor = dequantize_4bit(read(self.name), state)
        return found


@dataclass(frozen=True)
class Fp8:
    """A matrix in fp8 with a scale for each of its blocks. shape: None for that of the stored one."""

    name: str
    scale: str
    dtype: torch.dtype
    shape: None = None

    @property
    def stored(self) -> set[str]:
        """The names of the tensors that it is stored in."""
        return {self.name, self.scale}

    def read(self, read: Read) -> Tensor:
        """The matrix, in float32."""
        values, scale = read(self.name).float(), read(self.scale).float()
        for dimension in (0, 1):
            blocks = scale.shape[dimension]
            if values.shape[dimension] % blocks:
                raise DeltacomeError(f"{self.scale} does not fit the matrix that it scales; the checkpoint is broken")
            scale = scale.repeat_interleave(values.shape[dimension] // blocks, dim=dimension)
        return values * scale


Quantized = FourBit | Fp8


def find_quantized(source: str, config: dict[str, Any], names: Collection[str], read: Read) -> dict[str, Quantized]:
    """The quantized weights among the tensors of a checkpoint, by their names.

    Raises:
        DeltacomeError: if they are quantized in a way that is not known, or a library that reads them is missing.
    """
    settings = config.get("quantization_config")
    if not settings:
        return {}
    method = settings.get("quant_method")
    if method == "fp8":
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
        return {name: Fp8(name, f"{name}_scale_inv", dtype) for name in names if f"{name}_scale_inv" in names}
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return _four_bit(source, names, read)
    raise DeltacomeError(
        f"the weights of {source} are quantized by {method}, which deltacome does not read; quantize them to 4 bit "
        "with bitsandbytes or to fp8, or give the checkpoint that they were made from"
    )


def _four_bit(source: str, names: Collection[str], read: Read) -> dict[str, Quantized]:
    found: dict[str, dict[str, str]] = {}
    for name in names:
        part = re.fullmatch(r"(.+\.weight)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+)", name)
        if part:
            found.setdefault(part[1], {})[part[2]] = name
    try:
        states = {name: _state(parts, read) for name, parts in found.items()}
    except ImportError as error:
        raise DeltacomeError(
            f"the weights of {source} are quantized by bitsandbytes; pip install 'deltacome[bitsandbytes]' to read them"
        ) from error
    return {name: FourBit(name, parts, tuple(states[name].shape), states[name].dtype) for name, parts in found.items()}


def _state(parts: dict[str, str], read: Read) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict({key: read(name) for key, name in parts.items()}, device=torch.device("cpu"))
