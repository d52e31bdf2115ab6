"""The CPU kernel: packed codes times a few rows, all tenants of a matrix in one call, in float32.

Numba compiles it; the inner loops are in `vectors`. It runs on the threads of PyTorch's own OpenMP: a second pool of
threads beside them would wait for the same cores.

What Python hands over is a table of int64, a table per delta (`DELTA`, `TERM`, `PLANE`) and one row per delta of the
batch (`SEGMENT`), addresses being int64 too.
"""

import ctypes
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deltacome.rotation import signs_of
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import Packed
from deltacome.runtime.kernels.vectors import (
    LANES,
    SHIFTS,
    butterfly,
    current_number,
    floats,
    inner_1,
    inner_2,
    inner_4,
    inner_8,
    inner_16,
    integers,
    lane_hadamard,
    lift_1,
    lift_2,
    lift_4,
    lift_8,
    lift_16,
    next_number,
    outer_1,
    outer_2,
    outer_4,
    outer_8,
    outer_16,
    spread_1,
    spread_2,
    spread_4,
    spread_8,
    spread_16,
    yield_core,
)
from deltacome.runtime.kernels.vectors import words as words_at

MOST_ROWS = 16  # of one delta; from there on, taking the codes apart once and two dense products are faster

# Places in the table of a call, in a segment, and in the table of a delta with its terms and their planes.
X, Y, N, M, SEGMENTS, SEGMENT_COUNT, ROWS, ROW_COUNT = range(8)
INPUTS, INPUT_STRIDE, T, T_STRIDE, SUMS, SUM_STRIDE, OUTPUTS, INVERSE = range(8, 16)
RUNS, TASKS, ARRIVED = 16, 17, 21  # TASKS: one number for each of the four steps
DONE, FLAGS = 24, 32  # for each step: runs that are done; for each step and run: who takes it finds 0
RUNS_PER_THREAD = 4
DELTA_OF, START, COUNT = range(3)
SEGMENT = 3
ROW_NUMBERS, FACTORED_ROWS, ROTATED_U, ROTATED_V, SIGNS_U, SIGNS_V, SIGN_WORDS, SIGN_SCALE, TERMS = range(9)
DELTA = 9
BITS, RANK, SCALE, PLANES = range(4)
WIDTH, FIRST, U, V, T_START = range(5)
PLANE = 5
TERM = 4 + 3 * PLANE
CHUNK = 4096  # outputs that a thread takes at a time
BLOCK = 32  # entries of a vector whose codes fill whole words at every width


class _Table:
    """What the kernel reads of a delta: `content`, and how much work and memory it takes."""

    def __init__(self, packed: Packed) -> None:
        m, n = packed.shape
        rows = packed.factored_rows
        self.fast = not packed.grouped and not (packed.terms and packed.signs is not None)
        table = [
            packed.rows.data_ptr() if packed.rows is not None else 0,
            rows,
            "u" in packed.rotated,
            "v" in packed.rotated,
            signs_of(rows).data_ptr(),
            signs_of(n).data_ptr(),
            packed.signs.words.data_ptr() if packed.signs is not None else 0,
            packed.sign_scale.data_ptr() if packed.sign_scale is not None else 0,
            len(packed.terms),
        ]
        self.t_length = 0
        self.widths = 0
        for term in packed.terms:
            entry = [term.bits, term.rank, term.scale.data_ptr(), len(term.planes)]
            for plane in term.planes:
                u, v = plane.u.words.data_ptr(), plane.v.words.data_ptr()
                entry += [plane.width, plane.first, u, v, self.t_length]
                self.t_length += term.rank
                self.widths |= plane.width
            table += entry + [0] * (TERM - len(entry))
        self.sum_length = m if packed.signs is not None else sum_offset.py_func(rows, self.widths, 32)
        self.content = np.array(table, dtype=np.int64)
        present = [width for width in (1, 2, 4, 8, 16) if self.widths & width]
        self.inner_tasks = sum(-(-term.rank // LANES) for term in packed.terms)
        if packed.signs is not None:
            self.inner_tasks += -(-m // LANES)
        words = {width: -(-rows * width // 32) for width in present}
        self.outer_tasks = sum(-(-words[width] // LANES) * -(-32 // (SHIFTS * width)) for width in present)
        self.output_tasks = 1 if "u" in packed.rotated else -(-rows // CHUNK)

    @classmethod
    def of(cls, packed: Packed) -> "_Table":
        """The delta's table, made the first time."""
        if "cpu" not in packed.kept:
            packed.kept["cpu"] = cls(packed)
        table: _Table = packed.kept["cpu"]
        return table


class Work:
    """What one matrix of a batch has to do: as `reference.Work`."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        few, self.many, plain = [], [], []
        for packed, rows in deltas:
            if not _Table.of(packed).fast:
                plain.append((packed, rows))
            elif len(rows) > MOST_ROWS:
                self.many.append((packed, rows))
            else:
                few.append((packed, rows))
        self.plain = reference.Work(plain)
        self.few = _Few(few) if few else None

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        if self.few is not None:
            self.few.add(y, x)
        for packed, rows in self.many:
            _add_many(y, x, packed, rows)
        if self.plain.deltas:
            self.plain.add(y, x)


class _Few:
    """Deltas of a few rows each, the codes multiplied as they are."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        self.deltas = [packed for packed, _ in deltas]  # the tables have their addresses
        tables = [_Table.of(packed) for packed in self.deltas]
        self.rows = torch.cat([rows for _, rows in deltas])
        counts = [len(rows) for _, rows in deltas]
        starts = np.cumsum([0, *counts[:-1]])
        addresses = [table.content.ctypes.data for table in tables]
        self.segments = np.array(list(zip(addresses, starts, counts, strict=True)), dtype=np.int64)
        n = self.deltas[0].shape[1]
        self.data = np.zeros(FLAGS, dtype=np.int64)
        self.data[:INVERSE] = (
            0, 0, n, 0, self.segments.ctypes.data, len(deltas), self.rows.data_ptr(), len(self.rows),
            0, -(-n // 64) * 64 + 64,
            0, max(table.t_length for table in tables),
            0, max(table.sum_length for table in tables),
            0,
        )  # fmt: skip
        self.data[TASKS : TASKS + 4] = [
            len(self.rows),
            sum(table.inner_tasks for table in tables),
            sum(table.outer_tasks for table in tables),
            sum(table.output_tasks * count for table, count in zip(tables, counts, strict=True)),
        ]
        rows = len(self.rows)
        self.n, self.input_floats = n, 2 * rows * int(self.data[INPUT_STRIDE])
        self.t_floats, self.sum_floats = rows * int(self.data[T_STRIDE]), rows * int(self.data[SUM_STRIDE])

    def add(self, y: Tensor, x: Tensor) -> None:
        target = y if y.dtype == torch.float32 and y.is_contiguous() else torch.zeros(y.shape)
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        outputs = y.shape[1]
        data = _table_for_threads()
        data[:FLAGS] = self.data
        data[X], data[Y], data[M] = x.data_ptr(), target.data_ptr(), outputs
        data[INPUTS] = _scratch(self.n, self.input_floats).data_ptr()
        start = _scratch(0, self.t_floats + self.sum_floats + len(self.rows) * outputs).data_ptr()
        data[T], data[SUMS] = start, start + 4 * self.t_floats
        data[OUTPUTS] = start + 4 * (self.t_floats + self.sum_floats)
        _on_threads(_add_worker(), data)
        if target is not y:
            y += target.to(y.dtype)


_local = threading.local()


def _scratch(key: int, length: int) -> Tensor:
    """At least `length` floats of memory that this thread keeps for what `key` stands for."""
    kept: dict[Any, Tensor] = _local.__dict__
    found = kept.get(key)
    if found is None or found.numel() < length:
        found = kept[key] = torch.zeros(length)
    return found


def _add_many(y: Tensor, x: Tensor, packed: Packed, rows: Tensor) -> None:
    inputs = x[rows].float()
    if packed.signs is not None:
        y[rows, : packed.shape[0]] += reference.multiply(inputs, packed).to(y.dtype)
        return
    n, m = packed.shape[1], packed.factored_rows
    if "v" in packed.rotated:
        rotate_rows(inputs, inverse=False)
    u, v = torch.empty(packed.rank, m), torch.empty(n, packed.rank)
    data = _table_for_threads()
    data[[X, Y, N, M, SEGMENTS]] = v.data_ptr(), u.data_ptr(), n, m, _Table.of(packed).content.ctypes.data
    data[TASKS : TASKS + 2] = sum(-(-n // BLOCK) for _ in packed.terms), packed.rank
    _on_threads(_expand_worker(), data)
    scale = torch.cat([term.scale for term in packed.terms])
    product = (inputs @ v).mul_(scale) @ u
    if "u" in packed.rotated:
        rotate_rows(product, inverse=True)
    if packed.rows is None:
        y[rows, :m] += product.to(y.dtype)
    else:
        y[rows[:, None], packed.rows.long()[None]] += product.to(y.dtype)


def rotate_rows(x: Tensor, inverse: bool) -> None:
    """`rotation.rotate` or `unrotate` of the rows of a contiguous float32 matrix, in place."""
    data = _table_for_threads()
    count, n = x.shape
    data[[X, N, ROW_COUNT, SEGMENTS, INVERSE]] = x.data_ptr(), n, count, signs_of(n).data_ptr(), inverse
    data[TASKS] = count
    _on_threads(_rotate_worker(), data)


def columns(packed: Packed, places: Tensor) -> Tensor:
    """As `reference.columns`."""
    table = _Table.of(packed)
    if not table.fast:
        return reference.columns(packed, places)
    places = places.contiguous()
    found = torch.empty(packed.rank, len(places))
    data = _table_for_threads()
    data[[X, Y, N, M]] = places.data_ptr(), found.data_ptr(), len(places), packed.factored_rows
    data[SEGMENTS] = table.content.ctypes.data
    _columns_worker().ctypes(data.ctypes.data)
    return found


@cache
def _openmp() -> Any:
    """The OpenMP library that PyTorch runs on, None where it has another kind of threads."""
    libraries = Path(torch.__file__).parent / "lib"
    bundled = sorted(str(path) for pattern in ("libgomp*", "libiomp5*") for path in libraries.glob(pattern))
    for name in [*bundled, "libgomp.so.1"]:
        try:
            library = ctypes.CDLL(name)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            return library
        except (OSError, AttributeError):
            continue
    return None


def _table_for_threads() -> np.ndarray:
    """An empty table with flags for the runs of each step."""
    return np.zeros(FLAGS + 4 * RUNS_PER_THREAD * torch.get_num_threads(), dtype=np.int64)


def _on_threads(worker: Any, data: np.ndarray) -> None:
    """Run the worker on all threads at once, each with the address of the data.

    The tasks of a step are cut into runs. A thread takes its own runs first, the same part of every step so that its
    caches hold what the next one needs, and then those that others have not begun. So it does not matter how many
    threads come: they wait for runs to be done, never for each other's arrival.
    """
    threads = torch.get_num_threads()
    data[RUNS] = RUNS_PER_THREAD * threads
    library = _openmp() if threads > 1 else None
    if library is None:
        worker.ctypes(data.ctypes.data)
    else:
        library.GOMP_parallel(worker.address, data.ctypes.data, threads, 0)


@njit(inline="always")
def sum_offset(m, widths, width):  # type: ignore[no-untyped-def]
    """Where the sums of codes of `width` begin, those of the smaller ones among the bits of `widths` before them."""
    offset = 0
    for shift in range(5):
        smaller = 1 << shift
        if smaller < width and widths & smaller:
            offset += (32 // smaller) * (-(-m * smaller // 32) + 2 * LANES)
    return offset


@njit(inline="always")
def _take(data, step, run):  # type: ignore[no-untyped-def]
    """Whether this thread is the first that asks for the run."""
    return next_number(data.ctypes.data + 8 * (FLAGS + step * data[RUNS] + run)) == 0


@njit(inline="always")
def _finish(data, step):  # type: ignore[no-untyped-def]
    """Count a run as done."""
    next_number(data.ctypes.data + 8 * (DONE + step))


@njit(error_model="numpy")
def _wait(data, step):  # type: ignore[no-untyped-def]
    """Wait until all runs of a step are done."""
    counter = data.ctypes.data + 8 * (DONE + step)
    spins = 0
    while current_number(counter) < data[RUNS]:
        spins += 1
        if spins > 2000:  # more threads than cores, perhaps: let the others on
            yield_core()


@njit(error_model="numpy")
def _hadamard(x):  # type: ignore[no-untyped-def]
    start, width = x.ctypes.data, 1
    if x.size >= LANES:
        width = LANES
        for i in range(0, x.size, LANES):
            lane_hadamard(start + 4 * i)
    while width < x.size:
        for i in range(0, x.size, 2 * width):
            if width >= LANES:
                for j in range(i, i + width, LANES):
                    butterfly(start + 4 * j, start + 4 * (j + width))
            else:
                for j in range(i, i + width):
                    x[j], x[j + width] = x[j] + x[j + width], x[j] - x[j + width]
        width *= 2
    x *= np.float32(x.size**-0.5)


@njit(error_model="numpy")
def _rotate(x, signs, p):  # type: ignore[no-untyped-def]
    n = x.size
    x *= signs
    _hadamard(x[:p])
    if p < n:
        x *= signs
        _hadamard(x[n - p :])


@njit(error_model="numpy")
def _unrotate(x, signs, p):  # type: ignore[no-untyped-def]
    n = x.size
    if p < n:
        _hadamard(x[n - p :])
        x *= signs
    _hadamard(x[:p])
    x *= signs


@njit(error_model="numpy")
def _power(n):  # type: ignore[no-untyped-def]
    p = 1
    while 2 * p <= n:
        p *= 2
    return p


@njit(error_model="numpy")
def _inner(width, words, stride, count, x, out):  # type: ignore[no-untyped-def]
    if width == 1:
        inner_1(words, stride, count, x, out)
    elif width == 2:
        inner_2(words, stride, count, x, out)
    elif width == 4:
        inner_4(words, stride, count, x, out)
    elif width == 8:
        inner_8(words, stride, count, x, out)
    else:
        inner_16(words, stride, count, x, out)


@njit(error_model="numpy")
def _outer(width, words, stride, count, shift, t, out, out_stride, fresh):  # type: ignore[no-untyped-def]
    if width == 1:
        outer_1(words, stride, count, shift, t, out, out_stride, fresh)
    elif width == 2:
        outer_2(words, stride, count, shift, t, out, out_stride, fresh)
    elif width == 4:
        outer_4(words, stride, count, shift, t, out, out_stride, fresh)
    elif width == 8:
        outer_8(words, stride, count, shift, t, out, out_stride, fresh)
    else:
        outer_16(words, stride, count, shift, t, out, out_stride, fresh)


@njit(error_model="numpy")
def _lift(width, words, out, stride, weight):  # type: ignore[no-untyped-def]
    if width == 1:
        lift_1(words, out, stride, weight)
    elif width == 2:
        lift_2(words, out, stride, weight)
    elif width == 4:
        lift_4(words, out, stride, weight)
    elif width == 8:
        lift_8(words, out, stride, weight)
    else:
        lift_16(words, out, stride, weight)


@njit(error_model="numpy")
def _spread(width, word, out, weight):  # type: ignore[no-untyped-def]
    if width == 1:
        spread_1(word, out, weight)
    elif width == 2:
        spread_2(word, out, weight)
    elif width == 4:
        spread_4(word, out, weight)
    elif width == 8:
        spread_8(word, out, weight)
    else:
        spread_16(word, out, weight)


@njit(error_model="numpy")
def _equal(a, b):  # type: ignore[no-untyped-def]
    """Whether b begins with a."""
    different = 0
    for i in range(a.size):
        different += a[i] != b[i]
    return different == 0


@njit(error_model="numpy")
def _read_inputs(data, segments, rows, begin, end):  # type: ignore[no-untyped-def]
    """First step: each row of x, rotated where its delta asks for it, and after it, its sum.

    Neighbouring matrices have the same inputs (q, k and v; gate and up), and then the row lies there already.
    """
    n, stride = data[N], data[INPUT_STRIDE]
    for s in range(data[SEGMENT_COUNT]):
        delta = carray(integers(segments[s, DELTA_OF]), (DELTA,))
        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
            if not begin <= r < end:
                continue
            given = carray(floats(data[X] + 4 * rows[r] * n), (n,))
            x = carray(floats(data[INPUTS] + 8 * r * stride), (2 * stride,))
            last = x[stride:]  # what was read the last time, and after it, whether it was rotated
            if last[stride - 1] != 1 + delta[ROTATED_V] or not _equal(given, last):
                last[:n] = given
                last[stride - 1] = 1 + delta[ROTATED_V]
                x[:n] = given
                x[n : stride - 1] = 0
                if delta[ROTATED_V]:
                    _rotate(x[:n], carray(floats(delta[SIGNS_V]), (n,)), _power(n))
                x[stride - 1] = x[:n].sum()


@njit(error_model="numpy")
def _inner_products(data, segments, begin, end):  # type: ignore[no-untyped-def]
    """Second step: `t = (x V) * scale`, a copy per plane, times the plane's weight; or x times the signs."""
    n, stride = data[N], data[INPUT_STRIDE]
    part, total = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta = carray(integers(segments[s, DELTA_OF]), (DELTA,))
        terms = carray(integers(segments[s, DELTA_OF] + 8 * DELTA), (delta[TERMS], TERM))
        first_row, end_row = segments[s, START], segments[s, START] + segments[s, COUNT]
        if delta[SIGN_WORDS]:
            scale = carray(floats(delta[SIGN_SCALE]), (1,))[0]
            m = delta[FACTORED_ROWS]
            for start in range(0, m, LANES):
                if begin <= number < end:
                    for r in range(first_row, end_row):
                        x = data[INPUTS] + 8 * r * stride
                        x_sum = carray(floats(x), (stride,))[stride - 1]
                        out = carray(floats(data[SUMS] + 4 * r * data[SUM_STRIDE]), (m,))
                        words = -(-n // 32)
                        width = min(LANES, m - start)
                        inner_1(delta[SIGN_WORDS] + 4 * start * words, width, words, x, part.ctypes.data)
                        for i in range(width):
                            out[start + i] = scale * (2 * part[i] - x_sum)
                number += 1
        for term in terms:
            rank = term[RANK]
            middle = np.float32(((1 << term[BITS]) - 1) / 2)
            scales = carray(floats(term[SCALE]), (rank,))
            for start in range(0, rank, LANES):
                if begin <= number < end:
                    for r in range(first_row, end_row):
                        x = data[INPUTS] + 8 * r * stride
                        total[:] = -middle * carray(floats(x), (stride,))[stride - 1]
                        for i in range(term[PLANES]):
                            plane = _plane(term, i)
                            words = -(-n * plane[WIDTH] // 32)
                            tile = plane[V] + 4 * start * words
                            _inner(plane[WIDTH], tile, min(LANES, rank - start), words, x, part.ctypes.data)
                            for j in range(LANES):
                                total[j] += part[j] * (1 << plane[FIRST])
                        t = carray(floats(data[T] + 4 * r * data[T_STRIDE]), (data[T_STRIDE],))
                        for i in range(term[PLANES]):
                            plane = _plane(term, i)
                            for j in range(min(LANES, rank - start)):
                                t[plane[T_START] + start + j] = total[j] * scales[start + j] * (1 << plane[FIRST])
                number += 1


@njit(inline="always")
def _plane(term, i):  # type: ignore[no-untyped-def]
    return term[PLANES + 1 + PLANE * i : PLANES + 1 + PLANE * (i + 1)]


@njit(error_model="numpy")
def _widths(terms):  # type: ignore[no-untyped-def]
    found = 0
    for term in terms:
        for i in range(term[PLANES]):
            found |= term[PLANES + 1 + PLANE * i + WIDTH]
    return found


@njit(error_model="numpy")
def _outer_products(data, segments, begin, end):  # type: ignore[no-untyped-def]
    """Third step: sums of `t[k] * code[k, i]`, codes of the same width together, ordered by their place in the word."""
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta = carray(integers(segments[s, DELTA_OF]), (DELTA,))
        terms = carray(integers(segments[s, DELTA_OF] + 8 * DELTA), (delta[TERMS], TERM))
        m, widths = delta[FACTORED_ROWS], _widths(terms)
        for power in range(5):
            width = 1 << power
            if not widths & width:
                continue
            words = -(-m * width // 32)
            out_stride = words + 2 * LANES
            for start in range(0, words, LANES):
                for shift in range(0, 32, SHIFTS * width):
                    if begin <= number < end:
                        place = sum_offset(m, widths, width) + shift // width * out_stride + start
                        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
                            out = data[SUMS] + 4 * (r * data[SUM_STRIDE] + place)
                            fresh = 1
                            for term in terms:
                                for i in range(term[PLANES]):
                                    plane = _plane(term, i)
                                    if plane[WIDTH] == width:
                                        _outer(
                                            width,
                                            plane[U] + 4 * start * term[RANK],
                                            min(LANES, words - start),
                                            term[RANK],
                                            shift,
                                            data[T] + 4 * (r * data[T_STRIDE] + plane[T_START]),
                                            out,
                                            out_stride,
                                            fresh,
                                        )
                                        fresh = 0
                    number += 1


@njit(error_model="numpy")
def _write_outputs(data, segments, rows, begin, end):  # type: ignore[no-untyped-def]
    """Last step: the sums in the order of the outputs, rotated back, added to y."""
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta = carray(integers(segments[s, DELTA_OF]), (DELTA,))
        terms = carray(integers(segments[s, DELTA_OF] + 8 * DELTA), (delta[TERMS], TERM))
        m, widths = delta[FACTORED_ROWS], _widths(terms)
        chunk = m if delta[ROTATED_U] else CHUNK
        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
            sums = carray(floats(data[SUMS] + 4 * r * data[SUM_STRIDE]), (data[SUM_STRIDE],))
            y = carray(floats(data[Y] + 4 * rows[r] * data[M]), (data[M],))
            for start in range(0, m, chunk):
                if begin <= number < end:
                    stop = min(start + chunk, m)
                    out = carray(floats(data[OUTPUTS] + 4 * r * data[M]), (data[M],))[start:stop]
                    if delta[SIGN_WORDS]:
                        out[:] = sums[start:stop]
                    else:
                        _gather(out, sums, start, m, widths, terms, data[T] + 4 * r * data[T_STRIDE])
                    if delta[ROTATED_U]:
                        _unrotate(out, carray(floats(delta[SIGNS_U]), (m,)), _power(m))
                    if delta[ROW_NUMBERS]:
                        numbers = carray(words_at(delta[ROW_NUMBERS]), (m,))
                        for i in range(out.size):
                            y[numbers[start + i]] += out[i]
                    else:
                        for i in range(out.size):
                            y[start + i] += out[i]
                number += 1


@njit(error_model="numpy")
def _gather(out, sums, start, m, widths, terms, t):  # type: ignore[no-untyped-def]
    """The outputs from `start` on, a multiple of 32."""
    constant = np.float32(0)
    for term in terms:
        factors = carray(floats(t + 4 * term[PLANES + 1 + T_START]), (term[RANK],))
        total = np.float32(0)
        for k in range(term[RANK]):
            total += factors[k]
        constant += total * np.float32(((1 << term[BITS]) - 1) / 2)
    out[:] = -constant
    for power in range(5):
        width = 1 << power
        if widths & width:
            per_word = 32 // width
            stride = -(-m * width // 32) + 2 * LANES
            offset = sum_offset(m, widths, width) + start // per_word
            for i in range(per_word):
                column = sums[offset + i * stride :]
                for w in range(-(-(out.size - i) // per_word)):
                    out[w * per_word + i] += column[w]


@njit(error_model="numpy")
def _expand_v(data, delta, terms, begin, end):  # type: ignore[no-untyped-def]
    """Entries of V, (n, rank of all terms)."""
    n, rank_of_all = data[N], 0
    for term in terms:
        rank_of_all += term[RANK]
    v = carray(floats(data[X]), (n, rank_of_all))
    number, column = 0, 0
    for term in terms:
        rank = term[RANK]
        for start in range(0, n, BLOCK):
            if begin <= number < end:
                v[start : start + BLOCK, column : column + rank] = -np.float32(((1 << term[BITS]) - 1) / 2)
                for p in range(term[PLANES]):
                    plane = _plane(term, p)
                    width, count = plane[WIDTH], -(-n * plane[WIDTH] // 32)
                    weight, per_word = np.float32(1 << plane[FIRST]), 32 // width
                    for first_k in range(0, rank, LANES):
                        columns = min(LANES, rank - first_k)
                        for w in range(start // per_word, min((start + BLOCK) // per_word, count)):
                            words = plane[V] + 4 * (first_k * count + w * columns)
                            place = w * per_word
                            if columns == LANES and place + per_word <= n:
                                out = data[X] + 4 * (place * rank_of_all + column + first_k)
                                _lift(width, words, out, rank_of_all, weight)
                                continue
                            word = carray(words_at(words), (columns,))
                            for i in range(min(per_word, n - place)):
                                for k in range(columns):
                                    code = (word[k] >> np.int32(i * width)) & np.int32((1 << width) - 1)
                                    v[place + i, column + first_k + k] += weight * np.float32(code)
            number += 1
        column += rank


@njit(error_model="numpy")
def _expand_u(data, delta, terms, begin, end):  # type: ignore[no-untyped-def]
    """Entries of U, (rank of all terms, m)."""
    m = data[M]
    number = 0
    for term in terms:
        for k in range(term[RANK]):
            if begin <= number < end:
                out = carray(floats(data[Y] + 4 * number * m), (m,))
                out[:] = -np.float32(((1 << term[BITS]) - 1) / 2)
                for p in range(term[PLANES]):
                    plane = _plane(term, p)
                    width, count = plane[WIDTH], -(-m * plane[WIDTH] // 32)
                    weight, per_word = np.float32(1 << plane[FIRST]), 32 // width
                    for w in range(count):
                        start = w // LANES * LANES
                        columns = min(LANES, count - start)
                        word = plane[U] + 4 * (start * term[RANK] + k * columns + w - start)
                        place = w * per_word
                        if place + per_word <= m:
                            _spread(width, word, data[Y] + 4 * (number * m + place), weight)
                            continue
                        for i in range(m - place):
                            code = carray(words_at(word), (1,))[0] >> np.int32(i * width) & np.int32((1 << width) - 1)
                            out[place + i] += weight * np.float32(code)
            number += 1


NOTICE = "compiling the CPU kernel for this machine; this takes half a minute and is done once"


@cache
def compile_all() -> None:
    """Compile the workers, or load them from Numba's cache beside this file; says so if that takes long."""
    notice = threading.Timer(3.0, lambda: print(NOTICE, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        for worker in (_add_worker, _expand_worker, _rotate_worker, _columns_worker):
            worker()
    finally:
        notice.cancel()


@cache
def _add_worker() -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def add_worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        segments = carray(integers(data[SEGMENTS]), (data[SEGMENT_COUNT], SEGMENT))
        rows = carray(integers(data[ROWS]), (data[ROW_COUNT],))
        first = next_number(address + 8 * ARRIVED) * RUNS_PER_THREAD
        for step in range(4):
            for i in range(data[RUNS]):
                run = (first + i) % data[RUNS]
                if _take(data, step, run):
                    begin, end = data[TASKS + step] * run // data[RUNS], data[TASKS + step] * (run + 1) // data[RUNS]
                    if step == 0:
                        _read_inputs(data, segments, rows, begin, end)
                    elif step == 1:
                        _inner_products(data, segments, begin, end)
                    elif step == 2:
                        _outer_products(data, segments, begin, end)
                    else:
                        _write_outputs(data, segments, rows, begin, end)
                    _finish(data, step)
            _wait(data, step)

    return add_worker


@cache
def _expand_worker() -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def expand_worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        delta = carray(integers(data[SEGMENTS]), (DELTA,))
        terms = carray(integers(data[SEGMENTS] + 8 * DELTA), (delta[TERMS], TERM))
        for step in range(2):
            for run in range(data[RUNS]):
                if _take(data, step, run):
                    begin, end = data[TASKS + step] * run // data[RUNS], data[TASKS + step] * (run + 1) // data[RUNS]
                    if step == 0:
                        _expand_v(data, delta, terms, begin, end)
                    else:
                        _expand_u(data, delta, terms, begin, end)

    return expand_worker


@cache
def _rotate_worker() -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def rotate_worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        n = data[N]
        entry_signs = carray(floats(data[SEGMENTS]), (n,))
        for run in range(data[RUNS]):
            if _take(data, 0, run):
                for row in range(data[TASKS] * run // data[RUNS], data[TASKS] * (run + 1) // data[RUNS]):
                    x = carray(floats(data[X] + 4 * row * n), (n,))
                    if data[INVERSE]:
                        _unrotate(x, entry_signs, _power(n))
                    else:
                        _rotate(x, entry_signs, _power(n))

    return rotate_worker


@cache
def _columns_worker() -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def columns_worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        delta = carray(integers(data[SEGMENTS]), (DELTA,))
        terms = carray(integers(data[SEGMENTS] + 8 * DELTA), (delta[TERMS], TERM))
        places = carray(integers(data[X]), (data[N],))
        first_k = 0
        for term in terms:
            rank = term[RANK]
            out = carray(floats(data[Y] + 4 * first_k * data[N]), (rank, data[N]))
            out[:] = -np.float32(((1 << term[BITS]) - 1) / 2)
            for p in range(term[PLANES]):
                plane = _plane(term, p)
                width, count = plane[WIDTH], -(-data[M] * plane[WIDTH] // 32)
                mask = np.int32((1 << width) - 1)
                words = carray(words_at(plane[U]), (rank * count,))
                for i in range(data[N]):
                    word = places[i] // (32 // width)
                    start = word // LANES * LANES
                    columns = min(LANES, count - start)
                    shift = np.int32(places[i] % (32 // width) * width)
                    for k in range(rank):
                        code = (words[start * rank + k * columns + word - start] >> shift) & mask
                        out[k, i] += np.float32(code << plane[FIRST])
            first_k += rank

    return columns_worker
