"""A weight's bits as differences from its base's, coded without loss; `docs/format.md` describes the bytes.

The bit patterns of floating-point numbers, read as integers, are in the order of the numbers. A small change is a small
difference of integers, and the more so the larger the base's number is, since its steps are larger; so the base's
exponent is the context that a difference is coded in, together with a class of its row.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltacome.files import raw

CHUNK = 2**22  # entries that are coded with the same statistics, in whole rows
DIGEST_BYTES = 32
HEADER = struct.Struct("<IIhBB")  # bytes of the side information, words; first context, contexts, tokens
CLASSES_PER_OCTAVE = 2
LAST_CLASS = 80  # of rows that do not change
RARE = 1 / 1000  # share of a chunk's entries that may be in the first context, or the last, for being beyond it
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode(value: Tensor, base: Tensor) -> tuple[Tensor, torch.dtype]:
    """Code a weight (m, ...) by its base's in the same shape: the bytes as uint8, and the dtype whose bits they give.

    That is the weight's own, unless it is float32 and bfloat16 would do. Of the weight: one of `manifest.CODED_DTYPES`.
    """
    value = _narrowed(value)
    theirs = _converted(base, value.dtype)
    parts = [hashlib.sha256(raw(value)).digest()]
    for ours, other in zip(_chunks(value), _chunks(theirs), strict=True):
        parts.append(_encode_chunk(ours, other, value.dtype))
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8), value.dtype


def decode(data: Tensor, coded: torch.dtype, base: Tensor) -> Tensor:
    """The weight, in the dtype `coded`, that the bytes of `encode` stand for on that base, in its shape.

    Raises:
        ValueError: if the bytes are not those of a weight on that base.
    """
    content = data.numpy().data
    theirs = _converted(base, coded)
    weight = torch.empty_like(theirs)
    at = DIGEST_BYTES
    for ours, other in zip(_chunks(weight), _chunks(theirs), strict=True):
        at = _decode_chunk(content, at, ours, other, coded)
    if at != len(content) or hashlib.sha256(raw(weight)).digest() != bytes(content[:DIGEST_BYTES]):
        raise ValueError("they give another weight than the one that was coded")
    return weight


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A decoded weight in its own dtype: bfloat16 in float32 with its very bits, NaN's among them."""
    if weight.dtype == dtype:
        return weight
    return (weight.view(torch.int16).to(torch.int32) << 16).view(torch.float32)


def _narrowed(value: Tensor) -> Tensor:
    value = value.contiguous()
    if value.dtype == torch.float32 and not (value.view(torch.int32) & 0xFFFF).any():
        return (value.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return value


def _converted(base: Tensor, dtype: torch.dtype) -> Tensor:
    """The base in that dtype, rounded by way of float32; 0 for NaN, whose bits are nobody's agreement."""
    if base.dtype == dtype:
        return base.contiguous()
    converted = base.to(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
    return converted.masked_fill_(converted.isnan(), 0).contiguous()


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Views of a weight's bits as integers, (rows, entries of a row), each of as many rows as there is room for."""
    matrix = weight.view(INTEGERS[weight.dtype.itemsize]).view(len(weight) if weight.ndim > 1 else 1, -1)
    rows = max(1, CHUNK // matrix.shape[1])
    yield from matrix.split(rows)


def _ordered(bits: Tensor) -> Tensor:
    """Bit patterns of floating-point numbers as integers in their order, and back."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _exponents(bits: Tensor, dtype: torch.dtype) -> Tensor:
    mantissa = -int(math.log2(torch.finfo(dtype).eps))
    exponent = 8 * dtype.itemsize - 1 - mantissa
    return (bits >> mantissa) & (2**exponent - 1)


def _positions(exponents: Tensor, classes: NDArray[np.uint8]) -> Tensor:
    """Where entries are on the scale that contexts are cut from: half octaves of how small a change is in steps."""
    return CLASSES_PER_OCTAVE * exponents.to(torch.int16) + torch.from_numpy(classes.astype(np.int16))[:, None]


def _contexts(positions: Tensor, first: int, count: int) -> NDArray[np.uint8]:
    return (positions - first).clamp_(0, count - 1).to(torch.uint8).flatten().numpy()


def _encode_chunk(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bytes:
    from deltacome.format import entropy  # Numba, which takes a quarter of a second to import

    difference = _ordered(ours) - _ordered(theirs)
    last_bit = 8 * dtype.itemsize - 1
    zigzag = ((difference << 1) ^ (difference >> last_bit)).flatten().numpy()
    values = zigzag.view(f"u{dtype.itemsize}").astype(np.uint64)
    exponents = _exponents(theirs, dtype)
    classes = _row_classes(ours.view(dtype).float() - theirs.view(dtype).float())
    positions = _positions(exponents, classes)
    ordered = np.bincount(positions.flatten().numpy()).cumsum() / positions.numel()
    first, last = (int(np.searchsorted(ordered, share)) for share in (RARE, 1 - RARE))
    count = min(last - first + 1, 255)
    contexts = _contexts(positions, first, count)
    frequencies = entropy.count_tokens(values, contexts, count)
    words = entropy.encode(values, contexts, frequencies)
    side = zlib.compress(classes.tobytes() + frequencies.astype("<u2").tobytes(), 9)
    header = HEADER.pack(len(side), len(words), first, count, frequencies.shape[1])
    return header + side + words.astype("<u2").tobytes()


def _row_classes(change: Tensor) -> NDArray[np.uint8]:
    """A class for each row of a change, higher by one for a root mean square that is smaller by half an octave."""
    sizes = change.square().mean(1).nan_to_num(0, 0)
    octaves = torch.log2(sizes / sizes.max()) / 2
    classes = (-CLASSES_PER_OCTAVE * octaves).round().nan_to_num(0, LAST_CLASS).clamp(0, LAST_CLASS)
    return classes.to(torch.uint8).numpy()


def _decode_chunk(content: memoryview, at: int, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> int:
    """Fill `ours`; where the next chunk begins."""
    from deltacome.format import entropy  # Numba, which takes a quarter of a second to import

    try:
        side_bytes, word_count, first, count, tokens = HEADER.unpack_from(content, at)
        side_end = at + HEADER.size + side_bytes
        end = side_end + 2 * word_count
        rows, size = len(ours), len(ours) + 2 * count * tokens
        unpacker = zlib.decompressobj()
        side = unpacker.decompress(content[at + HEADER.size : side_end], size + 1)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"they are damaged ({error})") from error
    if len(side) != size or not unpacker.eof or unpacker.unused_data or end > len(content) or not count or not tokens:
        raise ValueError("their parts have other sizes than they must")
    classes = np.frombuffer(side, np.uint8, rows)
    frequencies = np.frombuffer(side, "<u2", offset=rows).reshape(count, tokens).astype(np.uint16)
    contexts = _contexts(_positions(_exponents(theirs, dtype), classes), first, count)
    words = np.frombuffer(content[side_end:end], "<u2").astype(np.uint16)
    zigzag = torch.from_numpy(entropy.decode(words, contexts, frequencies).view(np.int64)).view(ours.shape)
    difference = (((zigzag >> 1) & torch.iinfo(torch.int64).max) ^ -(zigzag & 1)).to(ours.dtype)
    ours.copy_(_ordered(_ordered(theirs) + difference))
    return end
