"""A reader of artifacts written from docs/format.md alone: numpy and the standard library, nothing of deltacome's."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1", "I64": "<i8", "BOOL": "u1"}


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, the matrices of stacks by themselves."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    found = {}
    for name, info in header.items():
        shape, own = info["shape"], data[slice(*info["data_offsets"])]
        if len(shape) == 3 and min(shape[1:]) >= 16:
            size = len(own) // shape[0]
            parts = {f"{name}[{i}]": own[i * size : (i + 1) * size] for i in range(shape[0])}
            found |= {part: (info["dtype"], shape[1:], content) for part, content in parts.items()}
        else:
            found[name] = (info["dtype"], shape, own)
    return found


def array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def fingerprint(base: Path) -> str:
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for path in base.glob("*.safetensors"):
        tensors |= read_safetensors(path)
    text = ""
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        text += f"{name} {dtype} {'x'.join(map(str, shape))} {hashlib.sha256(data).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def plane_widths(bits: int) -> list[int]:
    return [width for width in (16, 8, 4, 2, 1) if bits & width]


def vectors(words: np.ndarray, at: int, count: int, length: int, bits: int) -> tuple[np.ndarray, int]:
    """`count` vectors of codes from position `at` of the words, and the position after them."""
    codes = np.zeros((count, length), np.int64)
    for k in range(count):
        shift = 0
        for width in plane_widths(bits):
            per_word = 32 // width
            for j in range(length):
                word = int(words[at + j // per_word]) & 0xFFFFFFFF
                codes[k, j] |= (word >> width * (j % per_word) & 2**width - 1) << shift
            at += -(-length // per_word)
            shift += width
    return codes, at


def rotation(length: int) -> np.ndarray:
    """R, (length, length)."""
    p = 2 ** int(np.log2(length))
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in range(p)] for i in range(p)]) / np.sqrt(p)
    signs = []
    for h in range(1, length + 1):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        signs.append(-1.0 if (h ^ (h >> 16)) % 2 else 1.0)
    first, last = np.eye(length), np.eye(length)
    first[:p, :p] = hadamard
    last[length - p :, length - p :] = hadamard
    return (last @ np.diag(signs) if p < length else np.eye(length)) @ first @ np.diag(signs)


class Reader:
    def __init__(self, folder: Path, base: Path) -> None:
        text = (folder / "deltacome.json").read_bytes()
        assert text.startswith(b'{"sha256":"')
        assert hashlib.sha256(text[:11] + b"0" * 64 + text[75:]).hexdigest().encode() == text[11:75]
        self.manifest: dict[str, Any] = json.loads(text)
        assert self.manifest["format_version"] == 3
        for name, digest in self.manifest["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in self.manifest["base_files"].items():
            assert hashlib.sha256((base / name).read_bytes()).hexdigest() == digest
        assert fingerprint(base) == self.manifest["base"]["fingerprint"]
        self.raw: dict[str, tuple[str, list[int], bytes]] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                self.raw |= read_safetensors(folder / name)
        self.base: dict[str, tuple[str, list[int], bytes]] = {}
        for path in base.glob("*.safetensors"):
            self.base |= read_safetensors(path)

    def tensor(self, name: str) -> np.ndarray:
        return array(*self.raw[name])

    def weight(self, name: str) -> np.ndarray:
        """The rebuilt weight in float64."""
        entry = self.manifest["weights"][name]
        shape, base_name = entry["shape"], entry.get("base", name)
        rebuilt = np.zeros(shape)
        if base_name is not None:
            theirs = array(*self.base[base_name])
            rebuilt[: theirs.shape[0]] = theirs
        if "factored" in entry:
            rebuilt += self.factored(name, entry)
        if entry.get("sign"):
            words, scale = self.tensor(f"{name}.signs"), float(self.tensor(f"{name}.sign_scale")[0])
            for row in range(shape[0]):
                codes, _ = vectors(words[row], 0, 1, shape[1], 1)
                rebuilt[row] += np.where(codes[0] == 1, scale, -scale)
        if "dense" in entry:
            rebuilt[entry["dense"] :] = self.tensor(f"{name}.dense")
        return rebuilt

    def factored(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        m, n = entry["shape"]
        covered = np.arange(m)
        if "rows" in entry:
            marks, _ = vectors(self.tensor(f"{name}.rows"), 0, 1, m, 1)
            covered = np.flatnonzero(marks[0])
            assert len(covered) == entry["rows"]
        words, scales = self.tensor(f"{name}.codes"), self.tensor(f"{name}.scales")
        size = entry.get("group_size", 0)
        total, at, group_at, component = np.zeros((m, n)), 0, 0, 0
        for bits, rank in entry["factored"]:
            sides = []
            for side, length in (("u", len(covered)), ("v", n)):
                codes, at = vectors(words, at, rank, length, bits)
                if size:
                    count = -(-length // size)
                    part = slice(group_at, group_at + rank * count)
                    group_at = part.stop
                    group_scale, group_zero = (
                        np.repeat(self.tensor(f"{name}.{kind}")[part].reshape(rank, count), size, axis=1)[:, :length]
                        for kind in ("group_scales", "group_zeros")
                    )
                    sides.append(group_scale.astype(np.float64) * (codes - group_zero.astype(np.float64)))
                else:
                    levels = codes - (2**bits - 1) / 2
                    sides.append(levels @ rotation(length) if side in entry.get("rotated", "") else levels)
            for u, v in zip(*sides, strict=True):
                total[covered] += float(scales[component]) * np.outer(u, v)
                component += 1
        assert at == len(words) and component == len(scales)
        return total
