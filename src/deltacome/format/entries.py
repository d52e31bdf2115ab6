"""What the manifest says of each weight, and the tensors that its terms are stored in."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltacome.files import SAFETENSORS_DTYPES, TORCH_DTYPES
from deltacome.format.bits import BIT_WIDTHS, pack, unpack, words_per_row
from deltacome.format.terms import Coded, Dense, Factored, Groups, Sign, Term, groups_per_row
from deltacome.weights import is_embedding, is_matrix

CODED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_CLASSES = 4  # of a weight's rows
MOST_ELEMENTS = 2**40  # of a weight: a claim beyond that is refused before anything is computed from it


def term_tensors(terms: list[Term], shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `WeightEntry` that describe the terms of a weight, and their tensors by the suffix of their names.

    The factored terms of a weight all have the same groups and rotations; those of the same rows come one after the
    other, no row is in two classes of rows, and a sketch is the last one of a weight that has no classes.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    factored = [term for term in terms if isinstance(term, Factored)]
    if factored:
        fields["factored"] = tuple((term.bits, term.rank) for term in factored)
        tensors["codes"] = torch.cat([part.reshape(-1) for term in factored for part in _stored(term)])
        tensors["scales"] = torch.cat([term.scale for term in factored])
        if factored[-1].sketched:
            fields["sketched"] = True
        if factored[0].rotated:
            fields["rotated"] = factored[0].rotated
        groups = [term.groups for term in factored if term.groups is not None]
        if groups:
            fields["group_size"] = groups[0].size
            tensors["group_scales"] = torch.cat([x.reshape(-1) for g in groups for x in (g.u_scale, g.v_scale)])
            tensors["group_zeros"] = torch.cat([x.reshape(-1) for g in groups for x in (g.u_zero, g.v_zero)])
        if factored[0].rows is not None:
            fields["rows"], tensors["rows"] = _row_classes(factored, shape[0])
    for term in terms:
        if isinstance(term, Sign):
            fields["sign"] = True
            tensors["signs"], tensors["sign_scale"] = term.words, term.scale
        elif isinstance(term, Dense):
            fields["dense"] = term.start
            tensors["dense"] = term.value
        elif isinstance(term, Coded):
            fields["coded"] = (term.dtype, len(term.data))
            tensors["coded"] = term.data
    return fields, tensors


def _stored(term: Factored) -> list[Tensor]:
    """The words of u and v that go into a file."""
    if not term.sketched:
        return [term.u, term.v]
    return [term.u if term.shape[0] >= term.shape[1] else term.v]


def _row_classes(terms: list[Factored], m: int) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """`WeightEntry.rows` of terms for some rows each, of a weight with m rows, and the packed classes of the rows."""
    found: list[tuple[Tensor, int]] = []
    for term in terms:
        assert term.rows is not None
        if found and found[-1][0] is term.rows:
            found[-1] = term.rows, found[-1][1] + 1
        else:
            found.append((term.rows, 1))
    counts = [(len(rows), terms_of) for rows, terms_of in found]
    left = m - sum(count for count, _ in counts)
    if left:
        counts.append((left, 0))
    classes = torch.full((1, m), len(found), dtype=torch.int32)
    for number, (rows, _) in enumerate(found):
        classes[0, rows] = number
    return tuple(counts), pack(classes, class_bits(len(counts)))[0]


def class_bits(classes: int) -> int:
    """The bit-width of the class of a row, of so many."""
    return 1 if classes <= 2 else 2


@dataclass(frozen=True)
class WeightEntry:
    """What the manifest says of one weight of the fine-tuned model.

    base: its counterpart's name in the base, None if it has none. factored: (bits, rank) per term. sketched: whether
    the last of them is a sketch. rotated: the sides of the factored terms that are stored rotated. rows: the classes
    that the rows fall into, of each how many rows it has and how many of the factored terms, in order, are for these
    alone; empty if all terms are for all rows. dense: the first row that is stored exactly, None if none is. coded:
    dtype and number of bytes of a `Coded` term, None without one. error: relative Frobenius error of the rebuilt delta.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: str | None
    factored: tuple[tuple[int, int], ...] = ()
    sketched: bool = False
    rotated: str = ""
    rows: tuple[tuple[int, int], ...] = ()
    group_size: int = 0
    sign: bool = False
    dense: int | None = None
    coded: tuple[torch.dtype, int] | None = None
    error: float | None = None

    @classmethod
    def parse(cls, name: str, fields: dict[str, Any]) -> "WeightEntry":
        """Check and convert the manifest's fields.

        Raises:
            ValueError: naming what is wrong.
        """
        if not name.isprintable():
            raise ValueError("a name that cannot be printed")
        shape = tuple(fields["shape"])
        if not all(_is_count(side) for side in shape) or math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"shape {shape}")
        dtype = TORCH_DTYPES.get(fields["dtype"])
        if dtype is None:
            raise ValueError(f"dtype {fields['dtype']!r}")
        base = fields.get("base", name)
        factored = tuple((bits, rank) for bits, rank in fields.get("factored", ()))
        for bits, rank in factored:
            if not _is_count(bits) or bits not in BIT_WIDTHS or not _is_count(rank) or not rank or len(shape) != 2:
                raise ValueError(f"a term of rank {rank} with {bits} bits")
        rotated, rows = fields.get("rotated", ""), _parse_rows(fields.get("rows", ()), factored, shape)
        for m, terms in _by_rows(rows, factored, shape):
            if sum(rank for _, rank in terms) > min(m, shape[1]):
                raise ValueError(f"more components than a {m} x {shape[1]} matrix has")
        if rotated not in ("", "u", "v", "uv") or (rotated and not factored):
            raise ValueError(f"rotated sides {rotated!r}")
        group_size, sign, dense = fields.get("group_size", 0), fields.get("sign", False), fields.get("dense")
        if not _is_count(group_size) or not isinstance(sign, bool) or (sign and len(shape) != 2):
            raise ValueError("its terms")
        length = shape[0] if shape else 1
        if dense is not None and (not _is_count(dense) or dense >= max(length, 1)):
            raise ValueError(f"dense rows from {dense}")
        if not isinstance(base, str) and (base is not None or dense != 0):
            raise ValueError(f"base weight {base!r}")
        if group_size and (rotated or rows):
            raise ValueError("groups of rotated vectors or of some rows")
        sketched = fields.get("sketched", False)
        one_bit = bool(factored) and factored[-1][0] == 1
        if not isinstance(sketched, bool) or (sketched and (not one_bit or group_size or rows)):
            raise ValueError("a sketch of some rows, in groups, or not of one bit")
        coded = _coded(fields["coded"], dtype) if "coded" in fields else None
        if coded and (factored or sign or dense == 0 or not shape or 0 in shape or base is None):
            raise ValueError("coded bits beside other terms")
        error = fields.get("error")
        if error is not None and (isinstance(error, bool) or not isinstance(error, int | float)):
            raise ValueError(f"error {error!r}")
        return cls(name, shape, dtype, base, factored, sketched, rotated, rows, group_size, sign, dense, coded, error)

    def on(self, above: "WeightEntry | None") -> "WeightEntry":
        """What it comes to on its counterpart in a parent, see `Artifact`; not of a weight that is stored whole.

        Raises:
            ValueError: if it cannot be on that.
        """
        if above is None or len(above.shape) != len(self.shape) or above.shape[1:] != self.shape[1:]:
            raise ValueError(f"{self.name}: its parent has no weight {self.base!r} of its shape")
        if any(entry.sign or entry.group_size or entry.coded for entry in (self, above)):
            raise ValueError(f"{self.name}: terms that cannot be on others")
        exact = above.dense if above.dense is not None else (above.shape or (0,))[0]  # the first row not to be added to
        has_grown = above.shape != self.shape
        if above.shape > self.shape or (self.dense is None and has_grown) or (self.dense or 0) > exact:
            raise ValueError(f"{self.name}: rows that do not fit its parent's")
        if above.dense == 0 and self.tensors():
            raise ValueError(f"{self.name}: terms on a weight that its parent has whole")
        dense = above.dense if self.dense is None else self.dense
        return replace(self, base=above.base, dense=dense, error=above.error if self.error is None else self.error)

    def fields(self) -> dict[str, Any]:
        """The inverse of `parse`: the manifest's fields, defaults left out."""
        found: dict[str, Any] = {"shape": list(self.shape), "dtype": SAFETENSORS_DTYPES[self.dtype]}
        if self.base != self.name:
            found["base"] = self.base
        if self.factored:
            found["factored"] = [list(part) for part in self.factored]
        if self.sketched:
            found["sketched"] = True
        if self.rotated:
            found["rotated"] = self.rotated
        if self.rows:
            found["rows"] = [list(part) for part in self.rows]
        if self.group_size:
            found["group_size"] = self.group_size
        if self.sign:
            found["sign"] = True
        if self.dense is not None:
            found["dense"] = self.dense
        if self.coded is not None:
            found["coded"] = [SAFETENSORS_DTYPES[self.coded[0]], self.coded[1]]
        if self.error is not None:
            found["error"] = self.error
        return found

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
        """How many rows the factored terms are for, and these terms: one block, or one for each class of rows."""
        return _by_rows(self.rows, self.factored, self.shape)

    @property
    def coded_rows(self) -> int:
        """How many rows of it are coded, if any are."""
        return self.shape[0] if self.dense is None else self.dense

    def tensors(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor that the terms are stored in, by name."""
        found: dict[str, tuple[torch.dtype, list[int]]] = {}
        if self.factored:
            m, n = self.shape
            words = sum(
                rank * (words_per_row(count, bits) + words_per_row(n, bits))
                for count, terms in self.blocks
                for bits, rank in terms
            )
            if self.sketched:
                words -= self.factored[-1][1] * words_per_row(min(m, n), 1)
            rank = sum(rank for _, rank in self.factored)
            found[f"{self.name}.codes"] = (torch.int32, [words])
            found[f"{self.name}.scales"] = (torch.bfloat16, [rank])
            if self.rows:
                found[f"{self.name}.rows"] = (torch.int32, [words_per_row(m, class_bits(len(self.rows)))])
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
        if self.coded is not None:
            found[f"{self.name}.coded"] = (torch.uint8, [self.coded[1]])
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
        data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors().values())
        return data + self.metadata_bytes

    def terms(self, read: Callable[[str], Tensor]) -> list[Term]:
        """The terms, their tensors given by `read`, the codes being views of what it gives.

        Raises:
            ValueError: if the rows are in other classes than the entry says.
        """
        terms: list[Term] = []
        if self.factored:
            terms += self._factored_terms(read)
        if self.sign:
            m, n = self.shape
            terms.append(Sign((m, n), read(f"{self.name}.signs"), read(f"{self.name}.sign_scale")))
        if self.dense is not None:
            terms.append(Dense(read(f"{self.name}.dense"), self.dense))
        if self.coded is not None:
            terms.append(Coded(read(f"{self.name}.coded"), self.coded[0]))
        return terms

    def _factored_terms(self, read: Callable[[str], Tensor]) -> list[Term]:
        m, n = self.shape
        size = self.group_size
        rows_of: list[Tensor | None] = [None]
        if self.rows:
            classes = unpack(read(f"{self.name}.rows")[None], class_bits(len(self.rows)), m)[0]
            rows_of = [(classes == number).nonzero()[:, 0] for number in range(len(self.rows))]
            found = [len(rows) for rows in rows_of if rows is not None]
            if found != [count for count, _ in self.rows]:
                raise ValueError(f"{self.name}.rows has classes of {found} rows where its entry has {self.rows}")
        scales = _Cuts(read(f"{self.name}.scales"))
        codes = _Cuts(read(f"{self.name}.codes"))
        group_scales = _Cuts(read(f"{self.name}.group_scales")) if size else None
        group_zeros = _Cuts(read(f"{self.name}.group_zeros")) if size else None
        terms: list[Term] = []
        for rows, (count, own) in zip(rows_of, self.blocks, strict=True):
            for number, (bits, rank) in enumerate(own, 1):
                if self.sketched and number == len(own):
                    words = codes.take(rank, words_per_row(max(m, n), 1))
                    terms.append(Factored.sketch((m, n), words, scales.take(1, rank)[0], self.rotated))
                    continue
                u, v = (codes.take(rank, words_per_row(side, bits)) for side in (count, n))
                groups = None
                if group_scales is not None and group_zeros is not None:
                    (u_scale, v_scale), (u_zero, v_zero) = (
                        [cuts.take(rank, groups_per_row(side, size)) for side in (count, n)]
                        for cuts in (group_scales, group_zeros)
                    )
                    groups = Groups(size, u_scale, u_zero, v_scale, v_zero)
                scale = scales.take(1, rank)[0]
                terms.append(Factored(bits, (count, n), u, v, scale, groups, self.rotated, rows))
        return terms


def _by_rows(
    rows: tuple[tuple[int, int], ...], factored: tuple[tuple[int, int], ...], shape: tuple[int, ...]
) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """See `WeightEntry.blocks`."""
    if not rows:
        return [(shape[0], factored)] if factored else []
    blocks, first = [], 0
    for count, terms in rows:
        blocks.append((count, factored[first : first + terms]))
        first += terms
    return blocks


def _parse_rows(
    value: Any, factored: tuple[tuple[int, int], ...], shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """`WeightEntry.rows`, checked."""
    rows = tuple((count, terms) for count, terms in value)
    if not rows:
        return ()
    if not all(_is_count(count) and count and _is_count(terms) for count, terms in rows):
        raise ValueError(f"classes of rows {rows}")
    sums = [sum(part) for part in zip(*rows, strict=True)]
    if not 2 <= len(rows) <= MOST_CLASSES or not factored or sums != [shape[0], len(factored)]:
        raise ValueError(f"classes of rows {rows}")
    return rows


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


def compact(content: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _coded(field: Any, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype and the bytes of coded bits of a weight of some dtype.

    Raises:
        ValueError: if the field is not that.
    """
    name, size = field
    narrower = dtype == torch.float32 and name == "BF16"
    if (dtype not in CODED_DTYPES or name != SAFETENSORS_DTYPES[dtype]) and not narrower:
        raise ValueError(f"bits coded as {name!r}")
    if not _is_count(size):
        raise ValueError("bits coded in so many bytes")
    return TORCH_DTYPES[name], size


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
