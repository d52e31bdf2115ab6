"""The manifest of an artifact, and what it says of each weight."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.files import SAFETENSORS_DTYPES, TORCH_DTYPES
from deltacome.format.bits import BIT_WIDTHS, pack, unpack, words_per_row
from deltacome.format.terms import Dense, Factored, Groups, Sign, Term, groups_per_row
from deltacome.weights import is_embedding, is_matrix

FORMAT_VERSION = 3
MANIFEST = "deltacome.json"
WEIGHTS = "delta"
MODEL_CARD = "README.md"
MOST_BYTES = 2**26  # of a manifest, which takes some 200 a weight
NO_DIGEST = "0" * 64
DIGEST_START = b'{"sha256":"'


def term_tensors(terms: list[Term], shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `WeightEntry` that describe the terms of a weight, and their tensors by the suffix of their names.

    The factored terms of a weight all have the same groups, rotations and rows.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    factored = [term for term in terms if isinstance(term, Factored)]
    if factored:
        fields["factored"] = tuple((term.bits, term.rank) for term in factored)
        tensors["codes"] = torch.cat([part.reshape(-1) for term in factored for part in (term.u, term.v)])
        tensors["scales"] = torch.cat([term.scale for term in factored])
        if factored[0].rotated:
            fields["rotated"] = factored[0].rotated
        groups = [term.groups for term in factored if term.groups is not None]
        if groups:
            fields["group_size"] = groups[0].size
            tensors["group_scales"] = torch.cat([x.reshape(-1) for g in groups for x in (g.u_scale, g.v_scale)])
            tensors["group_zeros"] = torch.cat([x.reshape(-1) for g in groups for x in (g.u_zero, g.v_zero)])
        rows = factored[0].rows
        if rows is not None:
            fields["rows"] = len(rows)
            tensors["rows"] = pack(torch.zeros(1, shape[0], dtype=torch.int32).index_fill_(1, rows, 1), 1)[0]
    for term in terms:
        if isinstance(term, Sign):
            fields["sign"] = True
            tensors["signs"], tensors["sign_scale"] = term.words, term.scale
        elif isinstance(term, Dense):
            fields["dense"] = term.start
            tensors["dense"] = term.value
    return fields, tensors


@dataclass(frozen=True)
class WeightEntry:
    """What the manifest says of one weight of the fine-tuned model.

    base: its counterpart's name in the base, None if it has none. factored: (bits, rank) per term. rotated: the sides
    of the factored terms that are stored rotated. rows: how many rows the factored terms add to, None if to all.
    dense: the first row that is stored exactly, None if none is. error: relative Frobenius error of the rebuilt delta.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: str | None
    factored: tuple[tuple[int, int], ...] = ()
    rotated: str = ""
    rows: int | None = None
    group_size: int = 0
    sign: bool = False
    dense: int | None = None
    error: float | None = None

    @classmethod
    def parse(cls, name: str, fields: dict[str, Any]) -> "WeightEntry":
        """Check and convert the manifest's fields.

        Raises:
            ValueError: naming what is wrong.
        """
        shape = tuple(fields["shape"])
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError(f"shape {shape}")
        dtype = TORCH_DTYPES.get(fields["dtype"])
        if dtype is None:
            raise ValueError(f"dtype {fields['dtype']!r}")
        base = fields.get("base", name)
        factored = tuple((bits, rank) for bits, rank in fields.get("factored", ()))
        for bits, rank in factored:
            if bits not in BIT_WIDTHS or not isinstance(rank, int) or rank < 1 or len(shape) != 2:
                raise ValueError(f"a term of rank {rank} with {bits} bits")
        if factored and sum(rank for _, rank in factored) > min(shape):
            raise ValueError(f"more components than a {shape[0]} x {shape[1]} matrix has")
        rotated, covered = fields.get("rotated", ""), fields.get("rows")
        if rotated not in ("", "u", "v", "uv") or (rotated and not factored):
            raise ValueError(f"rotated sides {rotated!r}")
        if covered is not None and not (factored and isinstance(covered, int) and 0 < covered <= shape[0]):
            raise ValueError(f"terms for {covered} rows")
        group_size, sign, dense = fields.get("group_size", 0), fields.get("sign", False), fields.get("dense")
        if (
            not isinstance(group_size, int)
            or group_size < 0
            or not isinstance(sign, bool)
            or (sign and len(shape) != 2)
        ):
            raise ValueError("its terms")
        rows = shape[0] if shape else 1
        if dense is not None and (not isinstance(dense, int) or not 0 <= dense < max(rows, 1)):
            raise ValueError(f"dense rows from {dense}")
        if not isinstance(base, str) and (base is not None or dense != 0):
            raise ValueError(f"base weight {base!r}")
        if group_size and (rotated or covered is not None):
            raise ValueError("groups of rotated vectors or of some rows")
        return cls(name, shape, dtype, base, factored, rotated, covered, group_size, sign, dense, fields.get("error"))

    def fields(self) -> dict[str, Any]:
        """The inverse of `parse`: the manifest's fields, defaults left out."""
        found: dict[str, Any] = {"shape": list(self.shape), "dtype": SAFETENSORS_DTYPES[self.dtype]}
        if self.base != self.name:
            found["base"] = self.base
        if self.factored:
            found["factored"] = [list(part) for part in self.factored]
        if self.rotated:
            found["rotated"] = self.rotated
        if self.rows is not None:
            found["rows"] = self.rows
        if self.group_size:
            found["group_size"] = self.group_size
        if self.sign:
            found["sign"] = True
        if self.dense is not None:
            found["dense"] = self.dense
        if self.error is not None:
            found["error"] = self.error
        return found

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def factored_shape(self) -> tuple[int, int]:
        """(m, n) of the factored terms."""
        m, n = self.shape
        return (m if self.rows is None else self.rows), n

    def tensors(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor that the terms are stored in, by name."""
        found: dict[str, tuple[torch.dtype, list[int]]] = {}
        if self.factored:
            m, n = self.factored_shape
            words = sum(rank * (words_per_row(m, bits) + words_per_row(n, bits)) for bits, rank in self.factored)
            rank = sum(rank for _, rank in self.factored)
            found[f"{self.name}.codes"] = (torch.int32, [words])
            found[f"{self.name}.scales"] = (torch.bfloat16, [rank])
            if self.rows is not None:
                found[f"{self.name}.rows"] = (torch.int32, [words_per_row(self.shape[0], 1)])
            if self.group_size:
                groups = rank * sum(groups_per_row(side, self.group_size) for side in (m, n))
                found[f"{self.name}.group_scales"] = (torch.float16, [groups])
                found[f"{self.name}.group_zeros"] = (torch.uint8, [groups])
        if self.sign:
            found[f"{self.name}.signs"] = (torch.int32, [self.shape[0], words_per_row(self.shape[1], 1)])
            found[f"{self.name}.sign_scale"] = (torch.float32, [1])
        if self.dense is not None:
            rows = [self.shape[0] - self.dense, *self.shape[1:]] if self.shape else []
            found[f"{self.name}.dense"] = (self.dtype, rows)
        return found

    @property
    def metadata_bytes(self) -> int:
        """Bytes that the entry takes in the manifest, and its tensors in the headers of the weight files."""
        headers = (
            f'"{name}":{{"dtype":"{SAFETENSORS_DTYPES[dtype]}","shape":{shape},"data_offsets":[1000000,1000000]}},'
            for name, (dtype, shape) in self.tensors().items()
        )
        return sum(map(len, headers)) + len(compact({self.name: self.fields()})) - 1

    @property
    def bytes(self) -> int:
        """Bytes on disk: tensors and `metadata_bytes`."""
        data = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.tensors().values())
        return data + self.metadata_bytes

    def terms(self, read: Callable[[str], Tensor]) -> list[Term]:
        """The terms, their tensors given by `read`, the codes being views of what it gives.

        Raises:
            ValueError: if the bitmap of rows has another number of them than the entry.
        """
        terms: list[Term] = []
        if self.factored:
            terms += self._factored_terms(read)
        if self.sign:
            m, n = self.shape
            terms.append(Sign((m, n), read(f"{self.name}.signs"), read(f"{self.name}.sign_scale")))
        if self.dense is not None:
            terms.append(Dense(read(f"{self.name}.dense"), self.dense))
        return terms

    def _factored_terms(self, read: Callable[[str], Tensor]) -> list[Term]:
        m, n = self.factored_shape
        size = self.group_size
        rows = None
        if self.rows is not None:
            rows = unpack(read(f"{self.name}.rows")[None], 1, self.shape[0])[0].nonzero()[:, 0]
            if len(rows) != self.rows:
                raise ValueError(f"{self.name}.rows marks {len(rows)} rows where its entry has {self.rows}")
        ranks = [rank for _, rank in self.factored]
        scales = read(f"{self.name}.scales").split(ranks)
        codes = _Cuts(read(f"{self.name}.codes"))
        group_scales = _Cuts(read(f"{self.name}.group_scales")) if size else None
        group_zeros = _Cuts(read(f"{self.name}.group_zeros")) if size else None
        terms: list[Term] = []
        for (bits, rank), scale in zip(self.factored, scales, strict=True):
            u, v = (codes.take(rank, words_per_row(side, bits)) for side in (m, n))
            groups = None
            if group_scales is not None and group_zeros is not None:
                (u_scale, v_scale), (u_zero, v_zero) = (
                    [cuts.take(rank, groups_per_row(side, size)) for side in (m, n)]
                    for cuts in (group_scales, group_zeros)
                )
                groups = Groups(size, u_scale, u_zero, v_scale, v_zero)
            terms.append(Factored(bits, (m, n), u, v, scale, groups, self.rotated, rows))
        return terms


class _Cuts:
    """Successive matrices cut from a flat tensor."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.at = flat, 0

    def take(self, rows: int, columns: int) -> Tensor:
        start, self.at = self.at, self.at + rows * columns
        return self.flat[start : self.at].view(rows, columns)


def linear_ratio(entries: Iterable[WeightEntry]) -> float:
    """16-bit bytes of the linear weights (embeddings and head left out) over their bytes on disk, all counted."""
    linear = [entry for entry in entries if is_matrix(entry.shape) and not is_embedding(entry.name)]
    return sum(2 * entry.elements for entry in linear) / max(sum(entry.bytes for entry in linear), 1)


def write_manifest(folder: Path, manifest: dict[str, Any], weight_bytes: int) -> None:
    """Write the manifest, with the artifact ratio that its own size leads to and its own digest in front."""
    ratio = 0.0
    for _ in range(4):  # the ratio's digits change the size by a byte at most
        text = DIGEST_START + NO_DIGEST.encode() + b'",' + compact({**manifest, "ratio": ratio})[1:]
        ratio = round(manifest["finetuned_bytes"] / (weight_bytes + len(text)), 3)
    digest = hashlib.sha256(text).hexdigest().encode()
    (folder / MANIFEST).write_bytes(text.replace(NO_DIGEST.encode(), digest, 1))


def compact(content: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def plain_file_name(name: str) -> str:
    """A file name without folders, so that a tampered manifest reaches nothing outside."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise ValueError(f"file name {name!r}")
    return name


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest whose digest and version are right.

    Raises:
        DeltacomeError: if there is none, or it is damaged, changed or of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DeltacomeError(f"there is no folder {folder}")
    if not path.is_file():
        raise DeltacomeError(f"{folder} is no compressed delta: it has no {MANIFEST}")
    text = _read(path)
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeltacomeError(f"{path} is damaged: it is not the JSON that was written ({error})") from error
    if version != FORMAT_VERSION:
        raise DeltacomeError(
            f"{folder} has format version {version}, and this deltacome reads version {FORMAT_VERSION}; "
            "install the release that wrote it, or compress again"
        )
    start = len(DIGEST_START)
    blank = text[:start] + NO_DIGEST.encode() + text[start + len(NO_DIGEST) :]
    if (
        not text.startswith(DIGEST_START)
        or text[start : start + 64].decode("ascii", "replace") != hashlib.sha256(blank).hexdigest()
    ):
        raise DeltacomeError(f"{path} has been changed since it was written (its SHA-256 differs); fetch it again")
    ratio = manifest.get("ratio")
    if not isinstance(ratio, float | int) or not abs(ratio) < math.inf:
        raise DeltacomeError(f"{path} is damaged: it names no ratio")
    return manifest


def _read(path: Path) -> bytes:
    """The bytes of a manifest, which may be anybody's."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DeltacomeError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > MOST_BYTES:
        raise DeltacomeError(f"{path} is damaged: it is larger than {MOST_BYTES:,} bytes")
    return text
