"""The GPU kernel: packed codes times a few rows, one launch per stage for all bit-widths and all tenants of a matrix.

What a launch does lies in tables on the device, one row per program, with addresses of the packed words; they are made
once per batch, so that a CUDA graph can be captured of the rest.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltacome.rotation import signs_of
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import TILE, Packed
from deltacome.runtime.kernels.reference import columns

__all__ = ["Work", "columns"]

MOST_ROWS = 16  # of one delta; from there on, taking the codes apart once and two dense products are faster

COMPONENTS = tl.constexpr(32)  # that a program of the first stage computes
OUTPUTS = tl.constexpr(256)  # that a program of the second stage computes
WORDS = tl.constexpr(16)  # of V that a program reads at a time
RANKS = tl.constexpr(8)  # of U that a program reads at a time
TILED = tl.constexpr(TILE)


class Work:
    """What one matrix of a batch has to do: as `reference.Work`."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        def is_few(packed: Packed, rows: Tensor) -> bool:
            return not packed.grouped and not (packed.terms and packed.signs is not None) and len(rows) <= MOST_ROWS

        few = [delta for delta in deltas if is_few(*delta)]
        self.few = _Few(few) if few else None
        self.many = reference.Work([delta for delta in deltas if not is_few(*delta)])

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        if self.few is not None:
            self.few.add(y, x)
        self.many.add(y, x)


class _Few:
    """Deltas of a few rows each, their tables being on the device."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        self.deltas = [packed for packed, _ in deltas]  # the tables have their addresses
        self.rows = torch.cat([rows for _, rows in deltas])
        device = self.rows.device
        self.outputs = max(packed.factored_rows for packed in self.deltas)
        inner: list[list[int]] = []
        outer: list[list[int]] = []
        planes: list[list[int]] = []
        self.rotated_in: list[int] = []
        self.segments: list[tuple[Packed, slice]] = []
        self.t_length, start, self.scales = 1, 0, []
        for packed, rows in deltas:
            count = len(rows)
            if "v" in packed.rotated:
                self.rotated_in += range(start, start + count)
            first_plane, offset = len(planes), 0
            for term in packed.terms:
                words = [[plane.width, plane.first, plane.v.words.data_ptr(), plane.v.rows] for plane in term.planes]
                words += [[0, 0, 0, 0]] * (3 - len(words))
                for first in range(0, term.rank, COMPONENTS.value):
                    place = [start, count, first, term.rank, term.scale.data_ptr(), offset, 0]
                    inner.append(place + [number for plane in words for number in plane])
                for plane in term.planes:
                    u = plane.u
                    planes.append([plane.width, plane.first, u.words.data_ptr(), u.columns, term.rank, offset])
                offset += term.rank
            self.t_length = max(self.t_length, offset)
            if packed.signs is not None:
                assert packed.sign_scale is not None
                m = packed.shape[0]
                scale = (2 * packed.sign_scale).expand(m).contiguous()
                self.scales.append(scale)
                for first in range(0, m, COMPONENTS.value):
                    place = [start, count, first, m, scale.data_ptr(), 0, 1]
                    inner.append([*place, 1, 0, packed.signs.words.data_ptr(), packed.signs.rows, *[0] * 8])
            else:
                for first in range(0, packed.factored_rows, OUTPUTS.value):
                    outer.append([start, count, first, packed.factored_rows, first_plane, len(planes) - first_plane])
            self.segments.append((packed, slice(start, start + count)))
            start += count

        def table(rows: list[list[int]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=device)

        self.inner, self.outer, self.planes = table(inner), table(outer), table(planes)
        self.rotated_rows = table([self.rotated_in])[0] if self.rotated_in else None

    def add(self, y: Tensor, x: Tensor) -> None:
        inputs = x[self.rows].float()
        count, n = inputs.shape
        if self.rotated_rows is not None:
            if len(self.rotated_in) == count:
                inputs = _rotate(inputs)
            else:
                inputs[self.rotated_rows] = _rotate(inputs[self.rotated_rows])
        t = torch.empty(count, self.t_length, device=x.device)
        product = torch.empty(count, self.outputs, device=x.device)
        if len(self.inner):
            _inner_kernel[(len(self.inner),)](self.inner, inputs, t, product, n, t.stride(0), product.stride(0))
        if len(self.outer):
            _outer_kernel[(len(self.outer),)](self.outer, self.planes, t, product, t.stride(0), product.stride(0))
        for packed, rows in self.segments:
            own = product[rows, : packed.factored_rows]
            if "u" in packed.rotated:
                own = _unrotate(own)
            numbers = self.rows[rows]
            if packed.rows is None:
                y[:, : own.shape[1]].index_add_(0, numbers, own.to(y.dtype))
            else:
                y[numbers[:, None], packed.rows.long()[None]] += own.to(y.dtype)


@triton.jit
def _inner_products(words, count, rank, width: tl.constexpr, x, n, k):  # type: ignore[no-untyped-def]
    """`sum_j x[j] (code[j, k] - middle)` of the planes' codes, for the components k."""
    per_word: tl.constexpr = 32 // width
    words = words.to(tl.pointer_type(tl.int32))
    tile = k // TILED
    columns = tl.minimum(rank - tile * TILED, TILED)
    start = tile * TILED * count + k % TILED
    sums = tl.zeros((WORDS, COMPONENTS), tl.float32)
    x_sums = tl.zeros((WORDS,), tl.float32)
    for first in range(0, count, WORDS):
        w = first + tl.arange(0, WORDS)
        known = (w < count)[:, None] & (k < rank)[None]
        word = tl.load(words + start[None] + w[:, None] * columns[None], mask=known, other=0)
        for i in tl.static_range(per_word):
            j = w * per_word + i
            factor = tl.load(x + j, mask=j < n, other=0.0)
            code = (word >> (i * width)) & ((1 << width) - 1)
            sums += factor[:, None] * code.to(tl.float32)
            x_sums += factor
    return tl.sum(sums, axis=0) - tl.sum(x_sums, axis=0) * (((1 << width) - 1) / 2)


@triton.jit
def _inner_kernel(tasks, x, t, product, n, t_stride, product_stride):  # type: ignore[no-untyped-def]
    """First stage: `t = (x V) * scale`; with the signs of a sign term in place of V, the product itself."""
    task = tasks + tl.program_id(0) * 19
    start, count, first_k, rank = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    scales, offset, is_sign = tl.load(task + 4), tl.load(task + 5), tl.load(task + 6)
    k = first_k + tl.arange(0, COMPONENTS)
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + k, mask=k < rank, other=0.0)
    for r in range(start, start + count):
        row = x + r * n
        total = tl.zeros((COMPONENTS,), tl.float32)
        for p in tl.static_range(3):
            plane = task + 7 + 4 * p
            width, first, words, rows = tl.load(plane), tl.load(plane + 1), tl.load(plane + 2), tl.load(plane + 3)
            weight = (1 << first).to(tl.float32)
            if width == 1:
                total += weight * _inner_products(words, rows, rank, 1, row, n, k)
            if width == 2:
                total += weight * _inner_products(words, rows, rank, 2, row, n, k)
            if width == 4:
                total += weight * _inner_products(words, rows, rank, 4, row, n, k)
            if width == 8:
                total += weight * _inner_products(words, rows, rank, 8, row, n, k)
            if width == 16:
                total += weight * _inner_products(words, rows, rank, 16, row, n, k)
        if is_sign == 1:
            tl.store(product + r * product_stride + k, total * scale, mask=k < rank)
        else:
            tl.store(t + r * t_stride + offset + k, total * scale, mask=k < rank)


@triton.jit
def _outer_products(words, columns, rank, width: tl.constexpr, t, first_output):  # type: ignore[no-untyped-def]
    """`sum_k t[k] (code[k, i] - middle)` of a plane's codes, for OUTPUTS outputs."""
    per_word: tl.constexpr = 32 // width
    block: tl.constexpr = OUTPUTS // per_word
    words = words.to(tl.pointer_type(tl.int32))
    w = first_output // per_word + tl.arange(0, block)
    tile = w // TILED
    tile_width = tl.minimum(columns - tile * TILED, TILED)
    start = tile * TILED * rank + w % TILED
    shifts = tl.arange(0, per_word) * width
    sums = tl.zeros((RANKS, block, per_word), tl.float32)
    t_sums = tl.zeros((RANKS,), tl.float32)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS)
        factor = tl.load(t + k, mask=k < rank, other=0.0)
        known = (k < rank)[:, None] & (w < columns)[None]
        word = tl.load(words + start[None] + k[:, None] * tile_width[None], mask=known, other=0)
        code = (word[:, :, None] >> shifts[None, None]) & ((1 << width) - 1)
        sums += factor[:, None, None] * code.to(tl.float32)
        t_sums += factor
    middle = tl.sum(t_sums, axis=0) * (((1 << width) - 1) / 2)
    return tl.reshape(tl.sum(sums, axis=0), (OUTPUTS,)) - middle


@triton.jit
def _outer_kernel(tasks, planes, t, product, t_stride, product_stride):  # type: ignore[no-untyped-def]
    """Second stage: `product = t U^T`."""
    task = tasks + tl.program_id(0) * 6
    start, count, first_output, m = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    first_plane, plane_count = tl.load(task + 4), tl.load(task + 5)
    i = first_output + tl.arange(0, OUTPUTS)
    for r in range(start, start + count):
        total = tl.zeros((OUTPUTS,), tl.float32)
        for p in range(first_plane, first_plane + plane_count):
            plane = planes + p * 6
            width, first, words = tl.load(plane), tl.load(plane + 1), tl.load(plane + 2)
            columns, rank, offset = tl.load(plane + 3), tl.load(plane + 4), tl.load(plane + 5)
            weight = (1 << first).to(tl.float32)
            row = t + r * t_stride + offset
            if width == 1:
                total += weight * _outer_products(words, columns, rank, 1, row, first_output)
            if width == 2:
                total += weight * _outer_products(words, columns, rank, 2, row, first_output)
            if width == 4:
                total += weight * _outer_products(words, columns, rank, 4, row, first_output)
            if width == 8:
                total += weight * _outer_products(words, columns, rank, 8, row, first_output)
            if width == 16:
                total += weight * _outer_products(words, columns, rank, 16, row, first_output)
        tl.store(product + r * product_stride + i, total, mask=i < m)


def _rotate(x: Tensor) -> Tensor:
    """`rotation.rotate` in four products instead of dozens of small launches."""
    n = x.shape[-1]
    p = 1 << (n.bit_length() - 1)
    signs = _signs(n, x.device)
    x = x * signs
    x[:, :p] = _hadamard(x[:, :p])
    if p < n:
        x *= signs
        x[:, n - p :] = _hadamard(x[:, n - p :])
    return x


def _unrotate(x: Tensor) -> Tensor:
    n = x.shape[-1]
    p = 1 << (n.bit_length() - 1)
    signs = _signs(n, x.device)
    x = x.clone()
    if p < n:
        x[:, n - p :] = _hadamard(x[:, n - p :])
        x *= signs
    x[:, :p] = _hadamard(x[:, :p])
    return x * signs


def _hadamard(x: Tensor) -> Tensor:
    """The transform of p = a b entries is that of a Kronecker product of two Hadamard matrices."""
    count, p = x.shape
    a = 1 << ((p.bit_length() - 1) // 2)
    left, right = _matrix(a, x.device), _matrix(p // a, x.device)
    return (left @ x.reshape(count, a, p // a) @ right).reshape(count, p)


@cache
def _matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


@cache
def _signs(n: int, device: torch.device) -> Tensor:
    return signs_of(n).to(device)
