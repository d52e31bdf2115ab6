"""The CPU kernel: packed codes times a few rows, all tenants of a matrix in one call, in float32.

Numba compiles it (`steps`, `expansion`, `hadamard`). It runs on the threads of PyTorch's own OpenMP: a second pool of
threads beside them would wait for the same cores.
"""

import ctypes
import sys
import threading
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltacome.format.rotation import signs_of
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.expansion import BLOCK, columns_worker, expand_worker
from deltacome.runtime.kernels.hadamard import rotate_worker
from deltacome.runtime.kernels.packed import Packed
from deltacome.runtime.kernels.steps import CHUNK, add_worker
from deltacome.runtime.kernels.tables import (
    COUNT,
    DELTA_OF,
    FLAGS,
    INPUTS,
    INVERSE,
    OUTPUTS,
    ROW_COUNT,
    RUNS,
    RUNS_PER_THREAD,
    SEGMENT,
    SEGMENTS,
    START,
    SUMS,
    TASKS,
    TERM,
    M,
    N,
    T,
    X,
    Y,
    sum_offset,
)
from deltacome.runtime.kernels.vectors import LANES, SHIFTS

MOST_ROWS = 32  # of one delta; from there on, taking the codes apart once and two dense products are faster


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
        self.address = _address(self.content)
        present = [width for width in (1, 2, 4, 8, 16) if self.widths & width]
        self.inner_tasks = sum(-(-term.rank // LANES) for term in packed.terms)
        if packed.signs is not None:
            self.inner_tasks += -(-m // LANES)
        words = {width: -(-rows * width // 32) for width in present}
        self.outer_tasks = sum(-(-words[width] // LANES) * -(-32 // (SHIFTS * width)) for width in present)
        self.output_tasks = 1 if "u" in packed.rotated else -(-rows // CHUNK)

    @classmethod
    def of(cls, packed: Packed) -> "_Table":
        """The delta's table, made the first time; it lives as long as the delta, its address being in use."""
        return _tables.get(packed) or _tables.setdefault(packed, cls(packed))


_tables: WeakKeyDictionary[Packed, _Table] = WeakKeyDictionary()


class Work:
    """What one matrix of a batch has to do: as `reference.Work`."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        few, self.many, plain = [], [], []
        for packed, rows in deltas:
            if not _Table.of(packed).fast:
                plain.append((packed, rows))
            elif rows.numel() > MOST_ROWS:
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
        self.rows, segments, counts = _layout(tuple(rows for _, rows in deltas))
        self.count = self.rows.numel()
        self.segments = segments.copy()
        self.segments[:, DELTA_OF] = [table.address for table in tables]
        n = self.deltas[0].shape[1]
        stride = -(-n // 64) * 64 + 64
        t_stride = max([table.t_length for table in tables])
        sum_stride = max([table.sum_length for table in tables])
        self.data = np.zeros(FLAGS, dtype=np.int64)
        self.data[: TASKS + 4] = (
            0, 0, n, 0, _address(self.segments), len(tables), self.rows.data_ptr(), self.count,
            0, stride, 0, t_stride, 0, sum_stride, 0, 0, 0,
            self.count,
            sum([table.inner_tasks for table in tables]),
            sum([table.outer_tasks for table in tables]),
            sum([table.output_tasks * count for table, count in zip(tables, counts, strict=True)]),
        )  # fmt: skip
        self.n, self.input_floats = n, 2 * self.count * stride
        self.t_floats, self.sum_floats = self.count * t_stride, self.count * sum_stride

    def add(self, y: Tensor, x: Tensor) -> None:
        target = y if y.dtype == torch.float32 and y.is_contiguous() else torch.zeros(y.shape)
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        outputs = y.shape[1]
        data = _table_for_threads()
        data[:FLAGS] = self.data
        data[X], data[Y], data[M] = x.data_ptr(), target.data_ptr(), outputs
        data[INPUTS] = _scratch(self.n, self.input_floats).data_ptr()
        start = _scratch(0, self.t_floats + self.sum_floats + self.count * outputs).data_ptr()
        data[T], data[SUMS] = start, start + 4 * self.t_floats
        data[OUTPUTS] = start + 4 * (self.t_floats + self.sum_floats)
        _on_threads(add_worker(), data)
        if target is not y:
            y += target.to(y.dtype)


@lru_cache(maxsize=64)
def _layout(rows: tuple[Tensor, ...]) -> tuple[Tensor, np.ndarray, list[int]]:
    """What the matrices of a batch have in common: all rows, the segments without their deltas, and rows of each."""
    counts = [numbers.numel() for numbers in rows]
    segments = np.zeros((len(rows), SEGMENT), dtype=np.int64)
    segments[:, START], segments[:, COUNT] = [0, *accumulate(counts[:-1])], counts
    return torch.cat(rows), segments, counts


def _address(array: np.ndarray) -> int:
    """Where a contiguous array lies."""
    address: int = array.__array_interface__["data"][0]
    return address


_local = threading.local()


def _scratch(key: int, length: int) -> Tensor:
    """At least `length` floats of memory that this thread keeps for what `key` stands for."""
    buffers: dict[Any, Tensor] = _local.__dict__
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < length:
        buffer = buffers[key] = torch.zeros(length)
    return buffer


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
    data[[X, Y, N, M, SEGMENTS]] = v.data_ptr(), u.data_ptr(), n, m, _Table.of(packed).address
    data[TASKS : TASKS + 2] = sum(-(-n // BLOCK) for _ in packed.terms), packed.rank
    _on_threads(expand_worker(), data)
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
    _on_threads(rotate_worker(), data)


def columns(packed: Packed, places: Tensor) -> Tensor:
    """As `reference.columns`."""
    table = _Table.of(packed)
    if not table.fast:
        return reference.columns(packed, places)
    places = places.to(torch.int64).contiguous()
    entries = torch.empty(packed.rank, len(places))
    data = _table_for_threads()
    data[[X, Y, N, M]] = places.data_ptr(), entries.data_ptr(), len(places), packed.factored_rows
    data[SEGMENTS] = table.address
    columns_worker().ctypes(_address(data))
    return entries


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


def compute_alone() -> None:
    """Let the calling thread compute on itself alone from now on.

    With more OpenMP threads in a process than cores, all of them wait asleep for each other instead of awake, and every
    step of the one thread that serves takes half as long again, or twice as long.
    """
    torch.get_num_threads()  # PyTorch sets the thread's number when it first looks
    library = _openmp()
    if library is not None:
        library.omp_set_num_threads(1)


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
        worker.ctypes(_address(data))
    else:
        library.GOMP_parallel(worker.address, _address(data), threads, 0)


NOTICE = "compiling the CPU kernel for this machine; this takes half a minute and is done once"


@cache
def compile_all() -> None:
    """Compile the workers, or load them from Numba's cache beside this file; says so if that takes long."""
    notice = threading.Timer(3.0, lambda: print(NOTICE, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        for worker in (add_worker, expand_worker, rotate_worker, columns_worker):
            worker()
    finally:
        notice.cancel()
