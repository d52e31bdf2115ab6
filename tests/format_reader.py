"""A reader of artifacts written from docs/format.md alone: numpy and the standard library, nothing of deltacome's."""

import hashlib
import json
import struct
import zlib
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


def is_odd(number: int) -> bool:
    """Whether h(number) is odd."""
    h = (number ^ (number >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return (h ^ (h >> 16)) % 2 == 1


def directions(rank: int, length: int) -> np.ndarray:
    """The codes of a sketch's side that is in no file, (rank, length)."""
    return np.array([[((k & j).bit_count() + is_odd(j + 1) + 1) % 2 for j in range(length)] for k in range(rank)])


def rotation(length: int) -> np.ndarray:
    """R, (length, length)."""
    signs = [-1.0 if is_odd(j + 1) else 1.0 for j in range(length)]
    r, first = np.zeros((length, length)), 0
    while first < length:
        p = min(128, 2 ** int(np.log2(length - first)))
        hadamard = [[(-1) ** (i & j).bit_count() for j in range(p)] for i in range(p)]
        r[first : first + p, first : first + p] = np.array(hadamard) / np.sqrt(p)
        first += p
    return r @ np.diag(signs)


def flipped(bits: int, width: int) -> int:
    """All bits but the sign inverted if that is set."""
    return bits ^ 2 ** (width - 1) - 1 if bits >> width - 1 else bits


def converted(values: np.ndarray, dtype: str) -> bytes:
    """Numbers in another dtype, ties to even, without NaN."""
    with np.errstate(over="ignore"):
        values = np.nan_to_num(values.astype("<f8" if dtype == "F64" else "<f4"), posinf=np.inf, neginf=-np.inf)
        if dtype != "BF16":
            return values.astype(DTYPES[dtype]).tobytes()
    bits = values.view("<u4").astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2").tobytes()


class Reader:
    def __init__(self, folder: Path, base: Path) -> None:
        text = (folder / "deltacome.json").read_bytes()
        assert text.startswith(b'{"sha256":"')
        assert hashlib.sha256(text[:11] + b"0" * 64 + text[75:]).hexdigest().encode() == text[11:75]
        self.manifest: dict[str, Any] = json.loads(text)
        has_sketch = any("sketched" in entry for entry in self.manifest["weights"].values())
        assert self.manifest["format_version"] == (7 if has_sketch else 6 if "parent" in self.manifest else 5)
        self.parent: Reader | None = None
        if "parent" in self.manifest:
            self.parent = Reader(folder.parent / self.manifest["parent"]["name"], base)
            assert self.parent.manifest["sha256"] == self.manifest["parent"]["sha256"]
            assert self.parent.manifest["base"]["fingerprint"] == self.manifest["base"]["fingerprint"]
        self.files = dict(self.parent.files) if self.parent else {}
        for name, digest in self.manifest["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in self.manifest["base_files"].items():
            assert hashlib.sha256(self.files.get(name, base / name).read_bytes()).hexdigest() == digest
        own = {name: folder / name for name in self.manifest["files"] if not name.endswith(".safetensors")}
        self.files = {name: path for name, path in self.files.items() if name in self.manifest["base_files"]} | own
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
        if "coded" in entry:
            return array(entry["dtype"], entry["shape"], self.bits(name))
        rebuilt = self.sum(name)
        exact = self.exact(name)
        if exact is not None:
            rebuilt[exact[0] :] = exact[1]
        return rebuilt

    def exact(self, name: str) -> tuple[int, np.ndarray] | None:
        """The rows that replace others, and which is the first."""
        entry = self.manifest["weights"][name]
        if "dense" in entry:
            return entry["dense"], self.tensor(f"{name}.dense")
        return self.parent.exact(entry.get("base", name)) if self.parent else None

    def sum(self, name: str) -> np.ndarray:
        """The base's weight and all that is added."""
        entry = self.manifest["weights"][name]
        shape, base_name = entry["shape"], entry.get("base", name)
        rebuilt = np.zeros(shape)
        if entry.get("dense") == 0:
            return rebuilt
        if self.parent:
            theirs = self.parent.sum(base_name)
            rebuilt[: theirs.shape[0]] = theirs
        elif base_name is not None:
            theirs = array(*self.base[base_name])
            rebuilt[: theirs.shape[0]] = theirs
        if "factored" in entry:
            rebuilt += self.factored(name, entry)
        if entry.get("sign"):
            words, scale = self.tensor(f"{name}.signs"), float(self.tensor(f"{name}.sign_scale")[0])
            for row in range(shape[0]):
                codes, _ = vectors(words[row], 0, 1, shape[1], 1)
                rebuilt[row] += np.where(codes[0] == 1, scale, -scale)
        return rebuilt

    def bits(self, name: str) -> bytes:
        """The bytes of a weight that is coded."""
        entry, content = self.manifest["weights"][name], self.raw[f"{name}.coded"][2]
        (dtype, size), shape = entry["coded"], list(entry["shape"])
        assert size == len(content)
        rest = self.raw[f"{name}.dense"][2] if "dense" in entry else b""
        shape[0] = entry.get("dense", shape[0])
        theirs_dtype, theirs_shape, theirs = self.base[entry.get("base", name)]
        theirs = theirs[: len(theirs) // theirs_shape[0] * shape[0]]
        if theirs_dtype != dtype:
            theirs = converted(array(theirs_dtype, shape, theirs), dtype)
        width, mantissa, exponent = {"BF16": (16, 7, 8), "F16": (16, 10, 5), "F32": (32, 23, 8), "F64": (64, 52, 11)}[
            dtype
        ]
        row = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        base = [int(x) for x in np.frombuffer(theirs, f"<u{width // 8}")]
        found: list[int] = []
        at = 32
        while len(found) < len(base):
            some = base[len(found) :][: max(1, 2**22 // row) * row]
            side_bytes, count, first, contexts, tokens = struct.unpack_from("<IIhBB", content, at)
            side = zlib.decompress(content[at + 12 : at + 12 + side_bytes])
            rows = len(some) // row
            frequencies = np.frombuffer(side[rows:], "<u2").reshape(contexts, tokens)
            at += 12 + side_bytes + 2 * count
            words = iter(np.frombuffer(content[at - 2 * count : at], "<u2").tolist())
            x = next(words) + (next(words) << 16)
            for i, b in enumerate(some):
                e = b >> mantissa & 2**exponent - 1
                f = frequencies[min(max(2 * e + side[i // row] - first, 0), contexts - 1)].tolist()
                r = x % 2**12
                token, start = 0, 0
                while start + f[token] <= r:
                    start += f[token]
                    token += 1
                x = f[token] * (x >> 12) + r - start
                x = x if x >= 2**16 else (x << 16) + next(words)
                z = token
                if token >= 8:
                    k = 3 + (token - 8) // 4
                    z = 4 + (token - 8) % 4 << k - 2
                    for shift in range(0, k - 2, 16):
                        c = min(16, k - 2 - shift)
                        z += x % 2**c << shift
                        x >>= c
                        x = x if x >= 2**16 else (x << 16) + next(words)
                d = -(z + 1) // 2 if z % 2 else z // 2
                found.append(flipped((flipped(b, width) + d) % 2**width, width))
            assert x == 2**16 and next(words, None) is None
        data = np.array(found, f"<u{width // 8}").tobytes()
        assert at == len(content) and hashlib.sha256(data).digest() == content[:32]
        if dtype != entry["dtype"]:
            data = (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes()
        return data + rest

    def factored(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        m, n = entry["shape"]
        covered = [np.arange(m)] * len(entry["factored"])
        if "rows" in entry:
            classes, _ = vectors(self.tensor(f"{name}.rows"), 0, 1, m, 1 if len(entry["rows"]) == 2 else 2)
            covered = []
            for number, (count, terms) in enumerate(entry["rows"]):
                rows = np.flatnonzero(classes[0] == number)
                assert len(rows) == count
                covered += [rows] * terms
        words, scales = self.tensor(f"{name}.codes"), self.tensor(f"{name}.scales")
        size = entry.get("group_size", 0)
        total, at, group_at, component = np.zeros((m, n)), 0, 0, 0
        for number, (rows, (bits, rank)) in enumerate(zip(covered, entry["factored"], strict=True), 1):
            sides = []
            for side, length in (("u", len(rows)), ("v", n)):
                is_given = entry.get("sketched", False) and number == len(covered)
                if is_given and side == ("u" if m < n else "v"):
                    codes = directions(rank, length)
                else:
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
                total[rows] += float(scales[component]) * np.outer(u, v)
                component += 1
        assert at == len(words) and component == len(scales)
        return total
