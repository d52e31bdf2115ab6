"""A delta of one matrix as the kernels read it: the artifact's words, ordered so that they are read in a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltacome.format.bits import pack, planes, unpack
from deltacome.format.terms import Coded, Factored, Sign, Term

TILE = 8  # columns of a matrix of words that lie together


@dataclass(frozen=True)
class Tiled:
    """A matrix of int32 words, its columns cut into tiles of `TILE`: tile after tile, each row by row.

    Row i of tile t begins at `t * TILE * rows + i * width`, the last tile having the columns that are left. Behind the
    last word is room for a vector load.
    """

    words: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, matrix: Tensor, device: torch.device) -> "Tiled":
        """A copy of a matrix."""
        rows, columns = matrix.shape
        tiles, left = divmod(columns, TILE)
        down, right = matrix.stride()
        words = torch.empty(matrix.numel() + TILE, dtype=torch.int32, device=device)
        for first, shape in ((0, (tiles, rows, TILE)), (tiles * TILE, (1, rows, left))):
            if 0 not in shape:
                start = matrix.storage_offset() + first * right
                part = matrix.as_strided(shape, (TILE * right, down, right), start)
                words.as_strided(shape, (rows * TILE, shape[2], 1), first * rows).copy_(part)
        return cls(words, rows, columns)

    def to(self, device: torch.device) -> "Tiled":
        """A copy on a device, or itself if it is there."""
        return replace(self, words=self.words.to(device))

    def matrix(self) -> Tensor:
        """The matrix again."""
        whole = self.columns // TILE * TILE
        tiles = self.words[: self.rows * whole].view(-1, self.rows, TILE).transpose(0, 1).reshape(self.rows, whole)
        return torch.cat((tiles, self.words[self.rows * whole : self.rows * self.columns].view(self.rows, -1)), dim=1)

    def pick(self, columns: Tensor) -> Tensor:
        """Some of the columns: (rows, len(columns))."""
        tile = columns // TILE
        width = (self.columns - tile * TILE).clamp(max=TILE)
        first = tile * TILE * (self.rows - 1) + columns + torch.zeros_like(width)
        row = torch.arange(self.rows, device=columns.device)[:, None]
        return self.words[first + row * width]


@dataclass(frozen=True)
class Plane:
    """One plane of a term's codes: bits `first` to `first + width` of each.

    u: words (rank, words of m), or (words of rank, m) if they lie along the rank. v: words (words of n, rank).
    """

    width: int
    first: int
    u: Tiled
    v: Tiled


@dataclass(frozen=True)
class PackedTerm:
    """The components of one bit-width. scale: float32, (rank,)."""

    bits: int
    scale: Tensor
    planes: tuple[Plane, ...]

    def to(self, device: torch.device) -> "PackedTerm":
        """A copy on a device."""
        planes = tuple(replace(plane, u=plane.u.to(device), v=plane.v.to(device)) for plane in self.planes)
        return replace(self, scale=self.scale.to(device), planes=planes)

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

    terms: factored terms without groups. rotated: their rotated sides. rows: int32, the rows of the weight that they
    add to, None for all. signs: (words of n, m), the words of a sign term. grouped: terms with scales
    per group, which only the reference kernel computes. along_rank: whether the words of U run along the components, so
    that both products of a delta are sums over a word's codes, as GPUs like it; all tiles are full then.
    """

    shape: tuple[int, int]
    terms: tuple[PackedTerm, ...] = ()
    rotated: str = ""
    rows: Tensor | None = None
    signs: Tiled | None = None
    sign_scale: Tensor | None = None
    grouped: tuple[Factored, ...] = ()
    along_rank: bool = False

    @property
    def factored_rows(self) -> int:
        """Rows of U."""
        return self.shape[0] if self.rows is None else self.rows.numel()

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms)

    def to(self, device: torch.device) -> "Packed":
        """A copy on a device, or itself if it is there."""
        if self.device == device:
            return self
        rows, scale = (None if tensor is None else tensor.to(device) for tensor in (self.rows, self.sign_scale))
        moved = Packed(
            self.shape,
            tuple(term.to(device) for term in self.terms),
            self.rotated,
            rows,
            None if self.signs is None else self.signs.to(device),
            scale,
            tuple(_to(term, device) for term in self.grouped),
            self.along_rank,
        )
        return words_along_rank(moved) if device.type == "cuda" else moved

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps in memory."""
        found = [tensor for tensor in (self.rows, self.sign_scale) if tensor is not None]
        if self.signs is not None:
            found.append(self.signs.words)
        for term in self.terms:
            found += [term.scale, *(side.words for plane in term.planes for side in (plane.u, plane.v))]
        for grouped in self.grouped:
            assert grouped.groups is not None
            groups = grouped.groups
            found += [grouped.u, grouped.v, grouped.scale]
            found += [groups.u_scale, groups.u_zero, groups.v_scale, groups.v_zero]
        return found


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
    packed = Packed(shape, tuple(_pack_term(term, device) for term in plain))
    if plain:
        rows = plain[0].rows
        packed = replace(packed, rotated=plain[0].rotated, rows=None if rows is None else rows.to(device, torch.int32))
    for term in terms:
        if isinstance(term, Sign):
            words = Tiled.of(term.words.T, device)
            packed = replace(packed, signs=words, sign_scale=term.scale.to(device, torch.float32, copy=True))
    packed = replace(packed, grouped=tuple(_to(term, device) for term in factored if term.groups is not None))
    return words_along_rank(packed) if device.type == "cuda" else packed


def words_along_rank(packed: Packed) -> Packed:
    """The delta with the words of U along the components, and zeros behind all words up to whole tiles."""

    def padded(matrix: Tensor) -> Tiled:
        return Tiled.of(torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % TILE)), matrix.device)

    def laid_out(plane: Plane) -> Plane:
        codes = unpack(plane.u.matrix(), plane.width, packed.factored_rows)
        return replace(plane, u=padded(pack(codes.T, plane.width).T), v=padded(plane.v.matrix()))

    if packed.along_rank:
        return packed
    terms = (replace(term, planes=tuple(laid_out(plane) for plane in term.planes)) for term in packed.terms)
    signs = None if packed.signs is None else padded(packed.signs.matrix())
    return replace(packed, terms=tuple(terms), signs=signs, along_rank=True)


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


def unpack_term(term: PackedTerm, packed: Packed) -> tuple[Tensor, Tensor]:
    """The entries of a term's U (rank, m) and V (rank, n), as stored (rotated or not), in float32, without scales."""

    def entries(words: list[Tensor], length: int) -> Tensor:
        return unpack(torch.cat(words, dim=1), term.bits, length).float().sub_(term.middle)

    v = entries([plane.v.matrix()[:, : term.rank].T for plane in term.planes], packed.shape[1])
    if packed.along_rank:
        rows = packed.factored_rows
        return entries([plane.u.matrix()[:, :rows].T for plane in term.planes], term.rank).T, v
    return entries([plane.u.matrix() for plane in term.planes], packed.factored_rows), v


def _pack_term(term: Factored, device: torch.device) -> PackedTerm:
    m, n = term.shape
    found, u_start, v_start = [], 0, 0
    for first, width in planes(term.bits):
        u_end, v_end = u_start - (-m * width // 32), v_start - (-n * width // 32)
        u, v = term.u[:, u_start:u_end], term.v[:, v_start:v_end].T
        found.append(Plane(width, first, Tiled.of(u, device), Tiled.of(v, device)))
        u_start, v_start = u_end, v_end
    return PackedTerm(term.bits, term.scale.to(device, torch.float32, copy=True), tuple(found))


def _to(term: Factored, device: torch.device) -> Factored:
    groups = term.groups
    assert groups is not None
    fields = ("u_scale", "u_zero", "v_scale", "v_zero")
    moved = replace(groups, **{name: getattr(groups, name).to(device, copy=True) for name in fields})
    u, v, scale = (x.to(device, copy=True) for x in (term.u, term.v, term.scale))
    return replace(term, u=u, v=v, scale=scale, groups=moved)
