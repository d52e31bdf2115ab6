"""The CPU kernel: packed codes times a few rows, all tenants of a matrix in one call, in integers.

Numba compiles it (`steps`, `expansion`, `hadamard`). It runs on the threads of PyTorch's own OpenMP: a second pool of
threads beside them would wait for the same cores.
"""

import ctypes
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltacome.format.rotation import signs_of
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.expansion import BLOCK as ENTRIES
from deltacome.runtime.kernels.expansion import columns_worker, expand_worker
from deltacome.runtime.kernels.hadamard import rotate_worker
from deltacome.runtime.kernels.layout import VECTOR
from deltacome.runtime.kernels.packed import Packed
from deltacome.runtime.kernels.steps import BLOCK, CHUNK, add_worker
from deltacome.runtime.kernels.tables import (
    ADDRESS,
    DELTA,
    FLAGS,
    INPUT_SCALES,
    INPUTS,
    INVERSE,
    NUMBERS,
    OUTPUT_STRIDE,
    ROW_COUNT,
    RUNS,
    RUNS_PER_THREAD,
    SCRATCH,
    SEGMENT,
    SEGMENTS,
    STEPS,
    TASKS,
    M,
    N,
    X,
    Y,
    fill_calls,
)

MOST_ROWS = 128  # of one delta; from there on, taking the codes apart once and two dense products are faster


class _Table:
    """What the kernel reads of a delta: `content`, and how much work and memory it takes."""

    def __init__(self, packed: Packed) -> None:
        m, n = packed.shape
        rows = packed.factored_rows
        self.fast = not packed.grouped and not (packed.terms and packed.signs is not None)
        self.scale = torch.cat([term.scale for term in packed.terms] or [torch.empty(0)])
        table = [
            packed.rows.data_ptr() if packed.rows is not None else 0,
            rows,
            "u" in packed.rotated,
            "v" in packed.rotated,
            signs_of(rows).data_ptr(),
            signs_of(n).data_ptr(),
            packed.signs.words.data_ptr() if packed.signs is not None else 0,
            packed.sign_scale.data_ptr() if packed.sign_scale is not None else 0,
            packed.rank,
            self.scale.data_ptr(),
            len(packed.groups),
        ]
        planes = t_bytes = inner_tasks = 0
        self.runs = [np.array(group.runs, dtype=np.int64) for group in packed.groups]
        for group, runs in zip(packed.groups, self.runs, strict=True):
            count = group.count
            table += [group.width, count, len(runs), _address(runs)]
            table += [group.u.words.data_ptr(), group.v.words.data_ptr(), planes, t_bytes]
            planes += count
            t_bytes += -(-count // 32) * 32
            inner_tasks += -(-count // BLOCK)
        outer_tasks = -(-rows // BLOCK)
        if packed.signs is not None:
            inner_tasks, outer_tasks = -(-m // BLOCK), 0
        self.content = np.array(table, dtype=np.int64)
        self.address = _address(self.content)
        self.numbers = self.address, n, planes, rows, t_bytes, inner_tasks, outer_tasks, -(-rows // CHUNK)

    @classmethod
    def of(cls, packed: Packed) -> "_Table":
        """The delta's table, made the first time; it lives as long as the delta, its address being in use."""
        return _tables.get(packed) or _tables.setdefault(packed, cls(packed))


_tables: WeakKeyDictionary[Packed, _Table] = WeakKeyDictionary()
_nothing = np.zeros(DELTA, dtype=np.int64)  # the table of a delta that adds nothing


class ModelTable:
    """The tables of a tenant's deltas in all matrices of a model.

    deltas: by module what the tenant adds to its weight, None where that is not one delta.
    """

    def __init__(self, deltas: Mapping[str, Packed | None]) -> None:
        self.deltas = deltas  # the tables have their addresses
        tables = {name: None if packed is None else _Table.of(packed) for name, packed in deltas.items()}
        unknown = (0,) * NUMBERS
        self.by_name = {name: table.numbers if table and table.fast else unknown for name, table in tables.items()}
        self.names = tuple(self.by_name)
        self.numbers = self._of(self.names)

    def of(self, names: tuple[str, ...]) -> np.ndarray:
        """`_Table.numbers` of modules, (modules, NUMBERS): zeros where there is not one delta that is fast."""
        return self.numbers if names == self.names else self._of(names)

    def _of(self, names: tuple[str, ...]) -> np.ndarray:
        nothing = (_address(_nothing), *(0,) * (NUMBERS - 1))
        return np.array([self.by_name.get(name, nothing) for name in names], dtype=np.int64).reshape(-1, NUMBERS)


class ModelWork:
    """What the matrices of a model have to do for a batch, those where every tenant has one delta or none.

    tenants: at least one, each with the numbers of its rows.
    """

    def __init__(self, tenants: Sequence[tuple[ModelTable, Tensor]]) -> None:
        self.tables, rows = zip(*tenants, strict=True)
        names = self.tables[0].names
        if any(table.names != names for table in self.tables):
            names = tuple(dict.fromkeys(chain.from_iterable(table.names for table in self.tables)))
        numbers = np.stack([table.of(names) for table in self.tables])
        has_few_rows = max(own.numel() for own in rows) <= MOST_ROWS
        self.calls = _Calls(numbers, rows)
        known = numbers[:, :, ADDRESS].min(0).tolist()
        self.numbers = {name: i for i, name in enumerate(names) if known[i] and has_few_rows}

    def work(self, name: str) -> "_Few | None":
        """The `Work` of a module, None if it is not among them."""
        number = self.numbers.get(name)
        return None if number is None else _Few(self.calls, number)


class Work:
    """What one matrix of a batch has to do, or several that share an input: as `reference.Work`."""

    def __init__(self, deltas: Sequence[tuple[Packed, Tensor]], firsts: Sequence[int] | None = None) -> None:
        parts: dict[tuple[int, int], list[tuple[Packed, Tensor]]] = {}
        for delta, first in zip(deltas, firsts or [0] * len(deltas), strict=True):
            parts.setdefault((first, delta[0].turn), []).append(delta)
        self.parts = [(first, _Part(own)) for (first, _), own in parts.items()]

    def add(self, y: Tensor, x: Tensor) -> None:
        """As `reference.Work.add`."""
        for first, part in self.parts:
            part.add(y[:, first : first + part.outputs] if first or len(self.parts) > 1 else y, x)


class _Part:
    """Deltas whose first output is the same, and that are for different ones."""

    def __init__(self, deltas: list[tuple[Packed, Tensor]]) -> None:
        self.outputs = max(packed.shape[0] for packed, _ in deltas)
        few, self.many, plain = [], [], []
        for packed, rows in deltas:
            table = _Table.of(packed)
            if not table.fast:
                plain.append((packed, rows))
            elif rows.numel() > MOST_ROWS:
                self.many.append((packed, rows))
            else:
                few.append((packed, rows))
        self.plain = reference.Work(plain) if plain else None
        self.few = None
        if few:
            self.deltas, rows_of_few = zip(*few, strict=True)  # the tables have the deltas' addresses
            numbers = np.array([[_Table.of(packed).numbers] for packed in self.deltas], dtype=np.int64)
            self.few = _Few(_Calls(numbers, rows_of_few), 0)

    def add(self, y: Tensor, x: Tensor) -> None:
        if self.few is not None:
            self.few.add(y, x)
        for packed, rows in self.many:
            _add_many(y, x, packed, rows)
        if self.plain is not None:
            self.plain.add(y, x)


class _Calls:
    """The tables of calls, one for each of some matrices, with the same rows of a batch; see `tables.fill_calls`.

    numbers: `_Table.numbers` of each delta in each matrix, (deltas, matrices, NUMBERS). rows: of each delta its rows.
    """

    def __init__(self, numbers: np.ndarray, rows: tuple[Tensor, ...]) -> None:
        self.rows, counts = _layout(rows)
        deltas, matrices, _ = numbers.shape
        self.segments = np.empty((matrices, deltas, SEGMENT), dtype=np.int64)
        self.data, self.floats = np.zeros((matrices, FLAGS), dtype=np.int64), np.empty(matrices, dtype=np.int64)
        fill_calls(numbers, counts, self.rows.data_ptr(), self.segments, self.data, self.floats)


class _Few:
    """Deltas of a few rows each, the codes multiplied as they are: one of some calls."""

    def __init__(self, calls: _Calls, number: int) -> None:
        self.calls, self.data = calls, calls.data[number]
        self.n, self.count, self.outputs = (int(self.data[key]) for key in (N, ROW_COUNT, OUTPUT_STRIDE))
        self.floats = int(calls.floats[number])

    def add(self, y: Tensor, x: Tensor) -> None:
        target = y if y.dtype == torch.float32 and y.is_contiguous() else torch.zeros(y.shape)
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        data = _table_for_threads()
        data[:FLAGS] = self.data
        data[X], data[Y], data[M] = x.data_ptr(), target.data_ptr(), y.shape[1]
        _Inputs.of(self.n, self.count).enter(data)
        start = _scratch(self.floats)
        for key in SCRATCH:
            data[key] += start
        _on_threads(add_worker(), data)
        if target is not y:
            y += target.to(y.dtype)


class _Inputs:
    """What a thread keeps of the last rows that were multiplied: as they were given, and in two bytes a number.

    Behind the n numbers of a row are zeros, whatever it is multiplied with.
    """

    def __init__(self, n: int, rows: int) -> None:
        self.rows = rows
        step = -(-n // 64) * 64
        self.tensors = (
            torch.zeros(rows, n + 1),
            torch.zeros(rows, 2, step, dtype=torch.int8),
            torch.zeros(rows, 2, dtype=torch.float64),
        )
        last, in_bytes, scales = (tensor.data_ptr() for tensor in self.tensors)
        self.entries = np.array([last, n + 1, in_bytes, step, scales], dtype=np.int64)

    @classmethod
    def of(cls, n: int, rows: int) -> "_Inputs":
        """Those of this thread for rows of n numbers."""
        kept: dict[int, _Inputs] = _local.__dict__.setdefault("inputs", {})
        found = kept.get(n)
        if found is None or found.rows < rows:
            found = kept[n] = cls(n, rows)
        return found

    def enter(self, data: np.ndarray) -> None:
        """Put the addresses into the table of a call."""
        data[INPUTS : INPUT_SCALES + 1] = self.entries


@lru_cache(maxsize=64)
def _layout(rows: tuple[Tensor, ...]) -> tuple[Tensor, np.ndarray]:
    """What the matrices of a batch have in common: all rows, and how many each delta has."""
    return torch.cat(rows), np.array([numbers.numel() for numbers in rows], dtype=np.int64)


def _address(array: np.ndarray) -> int:
    """Where a contiguous array lies."""
    address: int = array.__array_interface__["data"][0]
    return address


_local = threading.local()


def _scratch(length: int) -> int:
    """The address of at least `length` floats of memory that this thread keeps, at a whole cache line."""
    buffer: Tensor | None = _local.__dict__.get("scratch")
    if buffer is None or buffer.numel() < length + 16:
        buffer = _local.scratch = torch.empty(length + 16)
    return -(-buffer.data_ptr() // 64) * 64


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
    data[TASKS : TASKS + 2] = -(-n // ENTRIES), -(-m // VECTOR)
    _on_threads(expand_worker(), data)
    product = (inputs @ v).mul_(_Table.of(packed).scale) @ u
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
    return np.zeros(FLAGS + STEPS * RUNS_PER_THREAD * torch.get_num_threads(), dtype=np.int64)


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
