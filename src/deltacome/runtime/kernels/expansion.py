"""The codes of a delta taken apart, compiled by Numba: all of them for a long prompt, some columns for an embedding."""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.runtime.kernels.layout import COLUMNS, VECTOR
from deltacome.runtime.kernels.tables import (
    COMPONENT,
    FIRST_BIT,
    FLAGS,
    PLANE_COUNT,
    RANK,
    RUN_LENGTH,
    RUNS,
    SEGMENTS,
    SOURCES,
    WIDTH,
    M,
    N,
    U,
    V,
    X,
    Y,
    delta_of,
    runs_of,
    take,
    tasks_of,
)
from deltacome.runtime.kernels.vectors import floats, integers, integers32, take_apart

BLOCK = 32  # entries of a vector whose codes fill whole words at every width


@njit(inline="always")
def _place(column, row, rows, columns):  # type: ignore[no-untyped-def]
    """Where a word lies in a matrix of words (rows, columns), in bytes from its start."""
    tile = column // COLUMNS * COLUMNS
    return 4 * (tile * rows + row * min(COLUMNS, columns - tile) + column - tile)


@njit(error_model="numpy")
def _planes(group):  # type: ignore[no-untyped-def]
    """Of each plane of a group its component, its weight, and what is taken from a code."""
    components, weights = np.empty(group[PLANE_COUNT], np.int64), np.empty(group[PLANE_COUNT], np.float32)
    place = 0
    for run in runs_of(group):
        for i in range(run[RUN_LENGTH]):
            components[place + i], weights[place + i] = run[COMPONENT] + i, 1 << run[FIRST_BIT]
        place += run[RUN_LENGTH]
    return components, weights, np.float32(((1 << group[WIDTH]) - 1) / 2)


@njit(error_model="numpy")
def _expand_v(data, rank, groups, codes, begin, end):  # type: ignore[no-untyped-def]
    """Entries of V, (n, rank), BLOCK rows a task."""
    n = data[N]
    v = carray(floats(data[X]), (n, rank))
    for start in range(begin * BLOCK, min(end * BLOCK, n), BLOCK):
        v[start : start + BLOCK] = 0
        for group in groups:
            width, count = group[WIDTH], group[PLANE_COUNT]
            components, weights, middle = _planes(group)
            per_word, rows = 32 // width, -(-n * width // 32)
            for first in range(0, count, VECTOR):
                columns = min(VECTOR, count - first)
                component, weight = components[first], weights[first]
                is_run = columns == VECTOR and components[first + VECTOR - 1] == component + VECTOR - 1
                is_run = is_run and weights[first + VECTOR - 1] == weight
                for w in range(start // per_word, min((start + BLOCK) // per_word, rows)):
                    take_apart(width, group[V] + _place(first, w, rows, count), codes.ctypes.data)
                    for i in range(min(per_word, n - w * per_word)):
                        row, own = v[w * per_word + i], codes[i * VECTOR : (i + 1) * VECTOR]
                        if is_run:
                            target = row[component : component + VECTOR]
                            for k in range(VECTOR):
                                target[k] += weight * (own[k] - middle)
                        else:
                            for k in range(columns):
                                row[components[first + k]] += weights[first + k] * (own[k] - middle)


@njit(error_model="numpy")
def _expand_u(data, rank, groups, codes, begin, end):  # type: ignore[no-untyped-def]
    """Entries of U, (rank, m), a vector of columns a task."""
    m = data[M]
    u = carray(floats(data[Y]), (rank, m))
    for first in range(begin * VECTOR, min(end * VECTOR, m), VECTOR):
        columns = min(VECTOR, m - first)
        u[:, first : first + columns] = 0
        for group in groups:
            width, count = group[WIDTH], group[PLANE_COUNT]
            components, weights, middle = _planes(group)
            per_word, rows = 32 // width, -(-count * width // 32)
            for w in range(rows):
                take_apart(width, group[U] + _place(first, w, rows, m), codes.ctypes.data)
                for i in range(min(per_word, count - w * per_word)):
                    target = u[components[w * per_word + i], first : first + columns]
                    weight, own = weights[w * per_word + i], codes[i * VECTOR : (i + 1) * VECTOR]
                    for k in range(columns):
                        target[k] += weight * (own[k] - middle)


@cache
def expand_worker() -> Any:
    """Take the codes of a delta apart: V to X, U to Y."""
    sources = SOURCES

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        _ = sources
        data = carray(integers(address), (FLAGS,))
        delta, groups = delta_of(data[SEGMENTS])
        codes = np.empty(32 * VECTOR, np.float32)
        for step in range(2):
            for run in range(data[RUNS]):
                if take(data, step, run):
                    begin, end = tasks_of(data, step, run)
                    if step == 0:
                        _expand_v(data, delta[RANK], groups, codes, begin, end)
                    else:
                        _expand_u(data, delta[RANK], groups, codes, begin, end)

    return worker


@cache
def columns_worker() -> Any:
    """Entries of U at some places, as `reference.columns`."""
    sources = SOURCES

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        _ = sources
        data = carray(integers(address), (FLAGS,))
        delta, groups = delta_of(data[SEGMENTS])
        places = carray(integers(data[X]), (data[N],))
        out = carray(floats(data[Y]), (delta[RANK], data[N]))
        out[:] = 0
        for group in groups:
            width, count = group[WIDTH], group[PLANE_COUNT]
            components, weights, middle = _planes(group)
            per_word, rows = 32 // width, -(-count * width // 32)
            words = carray(integers32(group[U]), (rows * data[M],))
            for i in range(data[N]):
                for k in range(count):
                    code = k % per_word
                    shift = np.int32(8 * (code % 4) + width * (code // 4))
                    word = words[_place(places[i], k // per_word, rows, data[M]) // 4]
                    value = np.float32((word >> shift) & np.int32((1 << width) - 1))
                    out[components[k], i] += weights[k] * (value - middle)

    return worker
