"""A delta of one matrix as the kernels read it: the artifact's codes, ordered so that they are read in a stream."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from deltacome.format.bits import pack, planes, unpack
from deltacome.format.terms import Coded, Factored, Sign, Term
from deltacome.runtime.kernels.layout import (
    COLUMNS,
    GPU_WIDTHS,
    VECTOR,
    WIDTHS,
    Run,
    bit_of,
    lay_columns,
    lay_rows,
    plan_groups,
)

UNIT = 128  # bits that a column of codes is filled up to on a GPU, and reads at once
CPU = torch.device("cpu")
AnyTerm = TypeVar("AnyTerm", bound=Term)


@dataclass(frozen=True)
class Tiled:
    """A matrix of int32 words as a CPU reads it, columns cut into tiles of COLUMNS: tile after tile, each row by row.

    Row i of tile t begins at `t * COLUMNS * rows + i * width`, the last tile having the columns that are left. What is
    behind the last word may be read, as a part of a vector. `layout` says how codes lie in words.
    """

    words: Tensor
    rows: int
    columns: int

    def to(self, device: torch.device) -> "Tiled":
        """A copy on a device, or itself if it is there."""
        return replace(self, words=self.words.to(device))

    def codes(self, width: int, length: int, columns: Tensor | None = None) -> Tensor:
        """Codes of `width` bits, of all columns or some: int32, (length, columns)."""
        words = self._matrix() if columns is None else self._pick(columns)
        bits = [bit_of(i, width) for i in range(32 // width)]
        shifts = torch.tensor(bits, dtype=torch.int32, device=words.device)
        return ((words[:, None] >> shifts[:, None]) & ((1 << width) - 1)).reshape(-1, words.shape[1])[:length]

    def _matrix(self) -> Tensor:
        whole = self.columns // COLUMNS * COLUMNS
        tiles = self.words[: self.rows * whole].view(-1, self.rows, COLUMNS).transpose(0, 1)
        rest = self.words[self.rows * whole : self.rows * self.columns].view(self.rows, -1)
        return torch.cat((tiles.reshape(self.rows, whole), rest), dim=1)

    def _pick(self, columns: Tensor) -> Tensor:
        tile = columns // COLUMNS
        width = (self.columns - tile * COLUMNS).clamp(max=COLUMNS)
        first = tile * COLUMNS * (self.rows - 1) + columns + torch.zeros_like(width)
        row = torch.arange(self.rows, device=columns.device)[:, None]
        return self.words[first + row * width]


@dataclass(frozen=True)
class Lined:
    """Codes as a GPU reads them: column after column, a column being `bytes_` bytes, a multiple of 16.

    words: uint8, (columns, bytes_). Code k of a column lies in byte `k % bytes_` at the place `k // bytes_`, so that
    the codes at a place of bytes side by side go with inputs side by side.
    """

    words: Tensor

    @classmethod
    def of(cls, codes: Tensor, width: int) -> "Lined":
        """Lay out codes (length, columns)."""
        length, columns = codes.shape
        room = -(-length * width // UNIT) * UNIT // 8
        filled = torch.nn.functional.pad(codes.T.to(torch.uint8), (0, room * 8 // width - length))
        shifts = torch.arange(0, 8, width, device=codes.device, dtype=torch.uint8)
        return cls((filled.view(columns, -1, room) << shifts[:, None]).sum(1, dtype=torch.uint8))

    @property
    def bytes_(self) -> int:
        """How many a column has."""
        return self.words.shape[1]

    def codes(self, width: int, length: int, columns: Tensor | None = None) -> Tensor:
        """As `Tiled.codes`."""
        words = self.words if columns is None else self.words[columns]
        shifts = torch.arange(0, 8, width, device=words.device, dtype=torch.uint8)
        codes = (words[:, None] >> shifts[:, None]) & ((1 << width) - 1)
        return codes.reshape(len(words), -1)[:, :length].T.to(torch.int32)


@dataclass(frozen=True)
class Group:
    """The planes of one width of all terms.

    runs: see `layout.plan_groups`. u: codes of U, a column an output. v: codes of V, a column a plane.
    """

    width: int
    runs: tuple[Run, ...]
    u: Tiled | Lined
    v: Tiled | Lined

    @property
    def count(self) -> int:
        """How many planes there are."""
        return sum(count for _, count, _ in self.runs)

    def sum_by_component(self, codes: Tensor, total: Tensor) -> None:
        """Add what the codes of planes (count, length) count to those of components (rank, length)."""
        place = 0
        for component, count, first in self.runs:
            total[component : component + count] += codes[place : place + count] << first
            place += count


@dataclass(frozen=True)
class PackedTerm:
    """The components of one bit-width. scale: float32, (rank,)."""

    bits: int
    scale: Tensor

    @property
    def rank(self) -> int:
        return self.scale.numel()

    @property
    def middle(self) -> float:
        """What a code of zero stands for, with the sign turned: an entry is `code - middle`."""
        return (2**self.bits - 1) / 2


@dataclass(frozen=True, eq=False)
class Packed:
    """A delta of shape (m, n), as it lies in memory.

    terms: factored terms whose entries have one scale a vector. rotated: their rotated sides. rows: int32, the rows of
    the weight that they add to, None for all. groups: their codes. signs: the codes of a sign term, a column a row of
    the weight. grouped: terms with scales per group of entries, which only the reference kernel computes. turn: of
    several deltas of a weight those of one turn add to different rows, so that kernels may compute them at once.
    """

    shape: tuple[int, int]
    terms: tuple[PackedTerm, ...] = ()
    rotated: str = ""
    rows: Tensor | None = None
    groups: tuple[Group, ...] = ()
    signs: Tiled | Lined | None = None
    sign_scale: Tensor | None = None
    grouped: tuple[Factored, ...] = ()
    turn: int = 0

    @property
    def factored_rows(self) -> int:
        """Rows of U."""
        return self.shape[0] if self.rows is None else self.rows.numel()

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms)

    def to(self, device: torch.device) -> "Packed":
        """A copy on a device, as its kernels read it, or itself if it is there. There is no way back from a GPU."""
        if self.device == device:
            return self

        def codes(side: Tiled | Lined) -> Tiled | Lined:
            return replace(side, words=side.words.to(device))

        rows, scale = (None if tensor is None else tensor.to(device) for tensor in (self.rows, self.sign_scale))
        moved = Packed(
            self.shape,
            tuple(PackedTerm(term.bits, term.scale.to(device)) for term in self.terms),
            self.rotated,
            rows,
            tuple(replace(group, u=codes(group.u), v=codes(group.v)) for group in self.groups),
            None if self.signs is None else codes(self.signs),
            scale,
            tuple(_to(term, device) for term in self.grouped),
            self.turn,
        )
        return for_gpu(moved) if device.type == "cuda" else moved

    @property
    def device(self) -> torch.device:
        found = self.tensors()
        return found[0].device if found else CPU

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps in memory."""
        found = [tensor for tensor in (self.rows, self.sign_scale) if tensor is not None]
        if self.signs is not None:
            found.append(self.signs.words)
        for term in self.terms:
            found.append(term.scale)
        for group in self.groups:
            found += [group.u.words, group.v.words]
        for grouped in self.grouped:
            assert grouped.groups is not None
            groups = grouped.groups
            found += [grouped.u, grouped.v, grouped.scale]
            found += [groups.u_scale, groups.u_zero, groups.v_scale, groups.v_zero]
        return found

    def entries(self) -> list[tuple[Tensor, Tensor]]:
        """Of each term U (rank, m) and V (rank, n), as stored (rotated or not), in float32, without scales."""
        u, v = codes_of(self)
        ranks = [term.rank for term in self.terms]
        pairs = zip(self.terms, u.split(ranks), v.split(ranks), strict=True)
        return [(own_u - term.middle, own_v - term.middle) for term, own_u, own_v in pairs]


def pack_blocks(terms: Sequence[Term], shape: tuple[int, int], device: torch.device) -> tuple[Packed, ...]:
    """Lay out the factored and sign terms of a weight of `shape`: one delta, or one for each of `blocks_of`."""
    packed: list[Packed] = []
    taken: list[Tensor] = []  # by turn, of each row whether a delta adds to it
    for block in blocks_of(terms):
        own = pack_terms(block, shape, device)
        rows = slice(None) if own.rows is None else own.rows.to(CPU, torch.int64)
        turn = next((i for i, others in enumerate(taken) if not others[rows].any()), len(taken))
        if turn == len(taken):
            taken.append(torch.zeros(shape[0], dtype=torch.bool))
        taken[turn][rows] = True
        packed.append(replace(own, turn=turn))
    return tuple(packed)


def blocks_of(terms: Sequence[AnyTerm]) -> list[list[AnyTerm]]:
    """Terms by the class of rows that they are for and the sides that are rotated."""
    blocks: dict[tuple[int | None, str], list[AnyTerm]] = {}
    for term in terms:
        rows, rotated = (term.rows, term.rotated) if isinstance(term, Factored) else (None, "")
        blocks.setdefault((None if rows is None else rows.data_ptr(), rotated), []).append(term)
    return list(blocks.values())


def pack_terms(terms: Sequence[Term], shape: tuple[int, int], device: torch.device) -> Packed:
    """Lay out the factored and sign terms of a weight of `shape` that are for the same rows."""
    factored = [term for term in terms if isinstance(term, Factored)]
    plain = [term for term in factored if term.groups is None]
    packed = Packed(
        shape,
        tuple(PackedTerm(term.bits, term.scale.to(CPU, torch.float32, copy=True)) for term in plain),
        plain[0].rotated if plain else "",
        plain[0].rows.to(CPU, torch.int32, copy=True) if plain and plain[0].rows is not None else None,
        _groups(plain),
        grouped=tuple(_to(term, CPU) for term in factored if term.groups is not None),
    )
    for term in terms:
        if isinstance(term, Sign):
            m, n = term.shape
            (words,) = _empty([(-(-n // 32), m)])
            lay_columns(term.words.cpu().numpy(), 0, 1, 0, 1, n, 0, words.words.numpy(), words.rows, m)
            packed = replace(packed, signs=words, sign_scale=term.scale.to(CPU, torch.float32, copy=True))
    return packed.to(device)


def _empty(shapes: Sequence[tuple[int, int]]) -> list[Tiled]:
    """Matrices of words (rows, columns), all zero, one behind the other, and behind the last room for a vector load."""
    ends = [0, *accumulate(rows * columns for rows, columns in shapes)]
    words = torch.zeros(ends[-1] + VECTOR, dtype=torch.int32)
    parts = zip(pairwise(ends), shapes, strict=True)
    return [Tiled(words[start:end], rows, columns) for (start, end), (rows, columns) in parts]


def _groups(terms: list[Factored]) -> tuple[Group, ...]:
    """The planes of all terms."""
    if not terms:
        return ()
    starts = [0, *accumulate(term.rank for term in terms)]
    (m, n), plan = terms[0].shape, plan_groups(((term.bits, term.rank) for term in terms), WIDTHS, 32)
    shapes = []
    for width, runs in plan.items():
        count = sum(length for _, length, _ in runs)
        shapes += [(-(-n * width // 32), count), (-(-count * width // 32), m)]
    sides = iter(_empty(shapes))
    groups = []
    for width, runs in plan.items():
        v, u = next(sides), next(sides)
        place = 0
        for component, length, first in runs:
            number = bisect_right(starts, component) - 1
            own = slice(component - starts[number], component - starts[number] + length)
            term = terms[number]
            for words, side, entries, lay in ((term.u, u, m, lay_rows), (term.v, v, n, lay_columns)):
                source, out = words[own].cpu().numpy(), side.words.numpy()
                where = _source(term.bits, first, entries)
                lay(source, *where, width, entries, place, out, side.rows, side.columns)
            place += length
        groups.append(Group(width, tuple(runs), u, v))
    return tuple(groups)


def _source(bits: int, bit: int, length: int) -> tuple[int, int, int]:
    """Where rows of the artifact's have a bit of their `length` codes: from which word on there are codes of how many
    bits, and which of these it is."""
    start = 0
    for first, width in planes(bits):
        if first <= bit < first + width:
            return start, width, bit - first
        start += -(-length * width // 32)
    raise ValueError(f"codes of {bits} bits have no bit {bit}")


def codes_of(packed: Packed) -> tuple[Tensor, Tensor]:
    """All codes of U (rank, m) and V (rank, n), int32, the components of all terms counted through."""
    device, n = packed.device, packed.shape[1]
    if not packed.terms:
        return torch.zeros(0, packed.factored_rows, device=device), torch.zeros(0, n, device=device)
    u = torch.zeros(packed.rank, packed.factored_rows, dtype=torch.int32, device=device)
    v = torch.zeros(packed.rank, n, dtype=torch.int32, device=device)
    for group in packed.groups:
        group.sum_by_component(group.u.codes(group.width, group.count), u)
        group.sum_by_component(group.v.codes(group.width, n).T, v)
    return u, v


def for_gpu(packed: Packed) -> Packed:
    """The delta as the GPU kernel reads it, on the same device."""
    n, signs, groups = packed.shape[1], packed.signs, []
    if isinstance(signs, Tiled):
        signs = Lined.of(signs.codes(1, n), 1)
    if not any(isinstance(group.u, Tiled) for group in packed.groups):
        return replace(packed, signs=signs) if signs is not packed.signs else packed
    u, v = codes_of(packed)
    for width, runs in plan_groups(((term.bits, term.rank) for term in packed.terms), GPU_WIDTHS, UNIT).items():
        own = [
            torch.cat([codes[component : component + count] >> first for component, count, first in runs])
            & ((1 << width) - 1)
            for codes in (u, v)
        ]
        groups.append(Group(width, tuple(runs), Lined.of(own[0], width), Lined.of(own[1].T, width)))
    return replace(packed, groups=tuple(groups), signs=signs)


def transposed(terms: list[Term]) -> list[Term]:
    """Terms of a weight that is stored as (in_features, out_features), as those of (out_features, in_features).

    Raises:
        ValueError: if a term is for some rows only, dense in part, or coded.
    """
    found: list[Term] = []
    for term in terms:
        if isinstance(term, Factored):
            if term.rows is not None:
                raise ValueError("terms of some rows of a transposed weight")
            groups = term.groups
            if groups is not None:
                groups = replace(
                    groups,
                    u_scale=groups.v_scale,
                    u_zero=groups.v_zero,
                    v_scale=groups.u_scale,
                    v_zero=groups.u_zero,
                )
            sides = term.rotated.translate({ord("u"): "v", ord("v"): "u"})
            shape = (term.shape[1], term.shape[0])
            found.append(replace(term, shape=shape, u=term.v, v=term.u, groups=groups, rotated="".join(sorted(sides))))
        elif isinstance(term, Sign):
            codes = unpack(term.words, 1, term.shape[1]).T
            found.append(Sign((term.shape[1], term.shape[0]), pack(codes, 1), term.scale))
        elif isinstance(term, Coded) or term.start:
            raise ValueError("dense rows or coded bits of a transposed weight")
        else:
            found.append(replace(term, value=term.value.T.contiguous()))
    return found


def _to(term: Factored, device: torch.device) -> Factored:
    groups = term.groups
    assert groups is not None
    fields = ("u_scale", "u_zero", "v_scale", "v_zero")
    moved = replace(groups, **{name: getattr(groups, name).to(device, copy=True) for name in fields})
    u, v, scale = (x.to(device, copy=True) for x in (term.u, term.v, term.scale))
    return replace(term, u=u, v=v, scale=scale, groups=moved)
