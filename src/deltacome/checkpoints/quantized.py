"""Weights that a checkpoint has quantized, as they are when they are computed with."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.weight_files import TensorInfo
from deltacome.errors import DeltacomeError
from deltacome.weights import split_stack

Read = Callable[[str], Tensor]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DEFAULT_BLOCK = (128, 128)  # where the configuration names no `weight_block_size`


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
    """A matrix in fp8 with a scale for each block of rows and columns, those at its edges being cut off.

    block: None if one scale is for the whole matrix. expert: the matrix's number, if the scales are a stack's. shape:
    None for that of the stored matrix.
    """

    name: str
    scale: str
    block: tuple[int, int] | None
    expert: int | None
    dtype: torch.dtype
    shape: None = None

    @property
    def stored(self) -> set[str]:
        """The names of the tensors that it is stored in; the scale of its inputs is none of the weights'."""
        return {self.name, self.scale, f"{self.name.removesuffix('weight')}activation_scale"}

    def read(self, read: Read) -> Tensor:
        """The matrix, in float32."""
        values, scale = read(self.name).float(), read(self.scale)
        if self.expert is not None:
            scale = scale[self.expert]
        # Whole bytes are exponents (E8M0).
        scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        if self.block is not None:
            for dimension, side in enumerate(self.block):
                scale = scale.repeat_interleave(side, dim=dimension).narrow(dimension, 0, values.shape[dimension])
        return values * scale


Quantized = FourBit | Fp8


def find_quantized(
    source: str, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read
) -> dict[str, Quantized]:
    """The quantized weights among the tensors of a checkpoint, by their names.

    Raises:
        DeltacomeError: if they are quantized in a way that is not known, their scales do not fit, or a library that
            reads them is missing.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        _check_plain(source, infos)
        return {}
    method = settings.get("quant_method")
    found: dict[str, Quantized]
    if method == "fp8":
        found = dict(_fp8(source, config, settings, infos))
    elif method in ("bitsandbytes", None) and settings.get("load_in_4bit"):
        found = dict(_four_bit(source, infos, read))
    else:
        raise DeltacomeError(
            f"the weights of {source} are quantized by {method}, which deltacome does not read; quantize them to 4 bit "
            "with bitsandbytes or to fp8, or give the checkpoint that they were made from"
        )
    if not found:
        raise DeltacomeError(
            f"config.json in {source} says that the weights are quantized ({method}), and none is; remove its "
            "quantization_config"
        )
    return found


def _check_plain(source: str, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse fp8 with scales that no configuration explains."""
    for name, info in infos.items():
        stored = split_stack(name)[0]
        scale = next((f"{stored}{end}" for end in ("_scale_inv", "_scale") if f"{stored}{end}" in infos), None)
        if info.dtype in FP8 and scale is not None:
            raise DeltacomeError(
                f"{source} holds {scale} beside {stored} in fp8, and its config.json has no quantization_config that "
                "says what the scales mean; take the checkpoint with the config.json that belongs to it"
            )


def _fp8(
    source: str, config: Mapping[str, Any], settings: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> dict[str, Fp8]:
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
    block = settings.get("weight_block_size", DEFAULT_BLOCK)
    if block is not None and (len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block)):
        raise DeltacomeError(f"weight_block_size in config.json of {source} is {block}, not two sizes; it is broken")
    found = {}
    for name, info in infos.items():
        stored, index = split_stack(name)
        scale, expert = f"{stored}_scale_inv", index
        if index is not None and f"{scale}[{index}]" in infos:
            scale, expert = f"{scale}[{index}]", None
        if scale not in infos:
            if info.dtype in FP8:
                raise DeltacomeError(f"{name} in {source} is in fp8 and there is no {scale}; the checkpoint is broken")
            continue
        shape = infos[scale].shape[0 if expert is None else 1 :]
        wanted = tuple(-(-size // side) for size, side in zip(info.shape, block or (), strict=False))
        fits = shape == wanted if block else torch.Size(shape).numel() == 1
        if info.dtype not in FP8 or len(info.shape) != 2 or not fits:
            raise DeltacomeError(
                f"{scale} does not fit the weight that it scales in {source}: {_by(shape)} for {_by(info.shape)} "
                f"{str(info.dtype).removeprefix('torch.')}, where weight_block_size in config.json is {block}"
            )
        found[name] = Fp8(name, scale, None if block is None else (block[0], block[1]), expert, dtype)
    return found


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


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
