"""The codes of a delta taken apart, compiled by Numba: all of them for a long prompt, some columns for an embedding."""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.runtime.kernels.tables import (
    BITS,
    FIRST,
    FLAGS,
    PLANES,
    RANK,
    RUNS,
    SEGMENTS,
    WIDTH,
    M,
    N,
    U,
    V,
    X,
    Y,
    delta_of,
    plane_of,
    take,
    tasks_of,
)
from deltacome.runtime.kernels.vectors import LANES, floats, integers, integers32, lift, spread

BLOCK = 32  # entries of a vector whose codes fill whole words at every width


@njit(error_model="numpy")
def _expand_v(data, terms, begin, end):  # type: ignore[no-untyped-def]
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
                    plane = plane_of(term, p)
                    width, count = plane[WIDTH], -(-n * plane[WIDTH] // 32)
                    weight, per_word = np.float32(1 << plane[FIRST]), 32 // width
                    for first_k in range(0, rank, LANES):
                        columns = min(LANES, rank - first_k)
                        for w in range(start // per_word, min((start + BLOCK) // per_word, count)):
                            words = plane[V] + 4 * (first_k * count + w * columns)
                            place = w * per_word
                            if columns == LANES and place + per_word <= n:
                                out = data[X] + 4 * (place * rank_of_all + column + first_k)
                                lift(width, words, out, rank_of_all, weight)
                                continue
                            word = carray(integers32(words), (columns,))
                            for i in range(min(per_word, n - place)):
                                for k in range(columns):
                                    code = (word[k] >> np.int32(i * width)) & np.int32((1 << width) - 1)
                                    v[place + i, column + first_k + k] += weight * np.float32(code)
            number += 1
        column += rank


@njit(error_model="numpy")
def _expand_u(data, terms, begin, end):  # type: ignore[no-untyped-def]
    """Entries of U, (rank of all terms, m)."""
    m = data[M]
    number = 0
    for term in terms:
        for k in range(term[RANK]):
            if begin <= number < end:
                out = carray(floats(data[Y] + 4 * number * m), (m,))
                out[:] = -np.float32(((1 << term[BITS]) - 1) / 2)
                for p in range(term[PLANES]):
                    plane = plane_of(term, p)
                    width, count = plane[WIDTH], -(-m * plane[WIDTH] // 32)
                    weight, per_word = np.float32(1 << plane[FIRST]), 32 // width
                    for w in range(count):
                        start = w // LANES * LANES
                        columns = min(LANES, count - start)
                        word = plane[U] + 4 * (start * term[RANK] + k * columns + w - start)
                        place = w * per_word
                        if place + per_word <= m:
                            spread(width, word, data[Y] + 4 * (number * m + place), weight)
                            continue
                        for i in range(m - place):
                            code = carray(integers32(word), (1,))[0] >> np.int32(i * width) & np.int32((1 << width) - 1)
                            out[place + i] += weight * np.float32(code)
            number += 1


@cache
def expand_worker() -> Any:
    """Take the codes of a delta apart: V to X, U to Y."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        _, terms = delta_of(data[SEGMENTS])
        for step in range(2):
            for run in range(data[RUNS]):
                if take(data, step, run):
                    begin, end = tasks_of(data, step, run)
                    if step == 0:
                        _expand_v(data, terms, begin, end)
                    else:
                        _expand_u(data, terms, begin, end)

    return worker


@cache
def columns_worker() -> Any:
    """Entries of U at some places, as `reference.columns`."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        _, terms = delta_of(data[SEGMENTS])
        places = carray(integers(data[X]), (data[N],))
        first_k = 0
        for term in terms:
            rank = term[RANK]
            out = carray(floats(data[Y] + 4 * first_k * data[N]), (rank, data[N]))
            out[:] = -np.float32(((1 << term[BITS]) - 1) / 2)
            for p in range(term[PLANES]):
                plane = plane_of(term, p)
                width, count = plane[WIDTH], -(-data[M] * plane[WIDTH] // 32)
                mask = np.int32((1 << width) - 1)
                words = carray(integers32(plane[U]), (rank * count,))
                for i in range(data[N]):
                    word = places[i] // (32 // width)
                    start = word // LANES * LANES
                    columns = min(LANES, count - start)
                    shift = np.int32(places[i] % (32 // width) * width)
                    for k in range(rank):
                        code = (words[start * rank + k * columns + word - start] >> shift) & mask
                        out[k, i] += np.float32(code << plane[FIRST])
            first_k += rank

    return worker
