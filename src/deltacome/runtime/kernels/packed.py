"""A delta of one matrix as the kernels read it: the artifact's codes, ordered so that they are read in a stream."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from deltacome.format.bits import pack, planes, unpack
from deltacome.format.terms import Coded, Factored, Sign, Term
from deltacome.runtime.kernels.layout import COLUMNS, VECTOR, Run, bit_of, lay_columns, lay_rows, plan_groups

TILE = 8  # columns of a matrix of words that lie together on a GPU
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiled:
    """A matrix of int32 words, its columns cut into tiles of `tile`: tile after tile, each row by row.

    Row i of tile t begins at `t * tile * rows + i * width`, the last tile having the columns that are left. What is
    behind the last word may be read, as a part of a vector.
    """

    words: Tensor
    rows: int
    columns: int
    tile: int

    def to(self, device: torch.device) -> "Tiled":
        """A copy on a device, or itself if it is there."""
        return replace(self, words=self.words.to(device))

    def matrix(self) -> Tensor:
        """The matrix again."""
        tile, whole = self.tile, self.columns // self.tile * self.tile
        tiles = self.words[: self.rows * whole].view(-1, self.rows, tile).transpose(0, 1).reshape(self.rows, whole)
        return torch.cat((tiles, self.words[self.rows * whole : self.rows * self.columns].view(self.rows, -1)), dim=1)

    def pick(self, columns: Tensor) -> Tensor:
        """Some of the columns: (rows, len(columns))."""
        tile = columns // self.tile
        width = (self.columns - tile * self.tile).clamp(max=self.tile)
        first = tile * self.tile * (self.rows - 1) + columns + torch.zeros_like(width)
        row = torch.arange(self.rows, device=columns.device)[:, None]
        return self.words[first + row * width]


@dataclass(frozen=True)
class Plane:
    """One plane of a term's codes on a GPU: bits `first` to `first + width` of each.

    u: words (words of rank, m). v: words (words of n, rank). Tiles are full.
    """

    width: int
    first: int
    u: Tiled
    v: Tiled


@dataclass(frozen=True)
class Group:
    """The planes of one width of all terms, as a CPU reads them.

    runs: see `layout.plan_groups`. u: words (words of count, m). v: words (words of n, count). `layout` says how codes
    lie in words.
    """

    width: int
    runs: tuple[Run, ...]
    u: Tiled
    v: Tiled

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

    def to(self, device: torch.device) -> "Group":
        """A copy on a device."""
        return replace(self, u=self.u.to(device), v=self.v.to(device))


@dataclass(frozen=True)
class PackedTerm:
    """The components of one bit-width. scale: float32, (rank,). planes: on a GPU."""

    bits: int
    scale: Tensor
    planes: tuple[Plane, ...] = ()

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
    the weight that they add to, None for all. groups: their codes, unless the terms have them, on a GPU. signs: (words
    of n, m), the words of a sign term. grouped: terms with scales per group of entries, which only the reference kernel
    computes.
    """

    shape: tuple[int, int]
    terms: tuple[PackedTerm, ...] = ()
    rotated: str = ""
    rows: Tensor | None = None
    groups: tuple[Group, ...] = ()
    signs: Tiled | None = None
    sign_scale: Tensor | None = None
    grouped: tuple[Factored, ...] = ()

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
        rows, scale = (None if tensor is None else tensor.to(device) for tensor in (self.rows, self.sign_scale))
        moved = Packed(
            self.shape,
            tuple(PackedTerm(term.bits, term.scale.to(device)) for term in self.terms),
            self.rotated,
            rows,
            tuple(group.to(device) for group in self.groups),
            None if self.signs is None else self.signs.to(device),
            scale,
            tuple(_to(term, device) for term in self.grouped),
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
            found += [term.scale, *(side.words for plane in term.planes for side in (plane.u, plane.v))]
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
    """Lay out the factored and sign terms of a weight of `shape`: one delta, or one for each class of its rows."""
    blocks: dict[int | None, list[Term]] = {}
    for term in terms:
        rows = term.rows if isinstance(term, Factored) else None
        blocks.setdefault(None if rows is None else rows.data_ptr(), []).append(term)
    return tuple(pack_terms(block, shape, device) for block in blocks.values())


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
    return [Tiled(words[start:end], rows, columns, COLUMNS) for (start, end), (rows, columns) in parts]


def _groups(terms: list[Factored]) -> tuple[Group, ...]:
    """The planes of all terms."""
    if not terms:
        return ()
    starts = [0, *accumulate(term.rank for term in terms)]
    (m, n), plan = terms[0].shape, plan_groups((term.bits, term.rank) for term in terms)
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
    if any(term.planes for term in packed.terms):
        found = [_codes_on_gpu(term, packed) for term in packed.terms]
        return torch.cat([u for u, _ in found]), torch.cat([v for _, v in found])
    u = torch.zeros(packed.rank, packed.factored_rows, dtype=torch.int32, device=device)
    v = torch.zeros(packed.rank, n, dtype=torch.int32, device=device)
    for group in packed.groups:
        group.sum_by_component(take_apart(group.u.matrix(), group.width, group.count), u)
        group.sum_by_component(take_apart(group.v.matrix(), group.width, n).T, v)
    return u, v


def take_apart(words: Tensor, width: int, length: int) -> Tensor:
    """Codes (length, columns) of a matrix of words (words of length, columns), as a CPU has them."""
    bits = [bit_of(i, width) for i in range(32 // width)]
    shifts = torch.tensor(bits, dtype=torch.int32, device=words.device)
    return ((words[:, None] >> shifts[:, None]) & ((1 << width) - 1)).reshape(-1, words.shape[1])[:length]


def _codes_on_gpu(term: PackedTerm, packed: Packed) -> tuple[Tensor, Tensor]:
    rows, (_, n) = packed.factored_rows, packed.shape
    u = torch.cat([plane.u.matrix()[:, :rows].T for plane in term.planes], dim=1)
    v = torch.cat([plane.v.matrix()[:, : term.rank].T for plane in term.planes], dim=1)
    return unpack(u, term.bits, term.rank).T, unpack(v, term.bits, n)


def for_gpu(packed: Packed) -> Packed:
    """The delta as the GPU kernel reads it, on the same device: the words of U and of V along the components and the
    inputs in the artifact's order, and zeros behind them up to whole tiles.
    """

    def tiled(codes: Tensor, width: int) -> Tiled:
        words = pack(codes, width).T
        rows, columns = words.shape
        columns = -(-columns // TILE) * TILE
        tiles = torch.nn.functional.pad(words, (0, columns - words.shape[1])).reshape(rows, -1, TILE).transpose(0, 1)
        return Tiled(torch.nn.functional.pad(tiles.reshape(-1), (0, TILE)), rows, columns, TILE)

    if not packed.groups and (packed.signs is None or packed.signs.tile == TILE):
        return packed
    u, v = codes_of(packed)
    ranks = [term.rank for term in packed.terms]
    terms = []
    for term, own_u, own_v in zip(packed.terms, u.split(ranks), v.split(ranks), strict=True):
        own = [
            Plane(width, first, *(tiled((codes >> first) & ((1 << width) - 1), width) for codes in (own_u.T, own_v)))
            for first, width in planes(term.bits)
        ]
        terms.append(replace(term, planes=tuple(own)))
    signs = packed.signs
    if signs is not None:
        signs = tiled(take_apart(signs.matrix(), 1, packed.shape[1]).T, 1)
    return replace(packed, terms=tuple(terms), groups=(), signs=signs)


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
