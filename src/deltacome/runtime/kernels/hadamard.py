"""The rotation of `format.rotation`, and its inverse, compiled by Numba: for the steps, and for rows by themselves."""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.format.rotation import BLOCK
from deltacome.runtime.kernels.tables import FLAGS, INVERSE, RUNS, SEGMENTS, SOURCES, N, X, take, tasks_of
from deltacome.runtime.kernels.vectors import LANES, butterfly, floats, integers, lane_hadamard


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
def transform(x):  # type: ignore[no-untyped-def]
    """The transforms of the blocks of x (n,), in place."""
    whole = x.size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _hadamard(x[start : start + BLOCK])
    size, start = BLOCK // 2, whole
    while start < x.size:
        if (x.size - whole) & size:
            _hadamard(x[start : start + size])
            start += size
        size //= 2


@njit(error_model="numpy")
def rotate(x, signs):  # type: ignore[no-untyped-def]
    """Rotate x (n,), in place, by its signs (n,)."""
    x *= signs
    transform(x)


@njit(error_model="numpy")
def unrotate(x, signs):  # type: ignore[no-untyped-def]
    """The inverse of `rotate`."""
    transform(x)
    x *= signs


@cache
def rotate_worker() -> Any:
    """Rotate rows, or rotate them back."""
    sources = SOURCES

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        _ = sources
        data = carray(integers(address), (FLAGS,))
        n = data[N]
        entry_signs = carray(floats(data[SEGMENTS]), (n,))
        for run in range(data[RUNS]):
            if take(data, 0, run):
                begin, end = tasks_of(data, 0, run)
                for row in range(begin, end):
                    x = carray(floats(data[X] + 4 * row * n), (n,))
                    if data[INVERSE]:
                        unrotate(x, entry_signs)
                    else:
                        rotate(x, entry_signs)

    return worker
