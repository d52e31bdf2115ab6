"""The four steps that add to y what a batch's deltas make of x, compiled by Numba; the inner loops are in `vectors`.

Numba keeps what it compiled beside this file and compiles again when this file changes, but not when `tables`,
`hadamard` or `vectors` do.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.runtime.kernels.hadamard import largest_power, rotate, unrotate
from deltacome.runtime.kernels.tables import (
    ARRIVED,
    BITS,
    COUNT,
    DELTA_OF,
    FACTORED_ROWS,
    FIRST,
    FLAGS,
    INPUT_STRIDE,
    INPUTS,
    OUTPUTS,
    PLANE,
    PLANES,
    RANK,
    ROTATED_U,
    ROTATED_V,
    ROW_COUNT,
    ROW_NUMBERS,
    ROWS,
    RUNS,
    RUNS_PER_THREAD,
    SCALE,
    SEGMENT,
    SEGMENT_COUNT,
    SEGMENTS,
    SIGN_SCALE,
    SIGN_WORDS,
    SIGNS_U,
    SIGNS_V,
    START,
    SUM_STRIDE,
    SUMS,
    T_START,
    T_STRIDE,
    WIDTH,
    M,
    N,
    T,
    U,
    V,
    X,
    Y,
    delta_of,
    finish,
    plane_of,
    sum_offset,
    take,
    tasks_of,
    wait,
)
from deltacome.runtime.kernels.vectors import (
    LANES,
    SHIFTS,
    floats,
    inner,
    inner_1,
    integers,
    integers32,
    next_number,
    outer,
)

CHUNK = 4096  # outputs that a thread takes at a time


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

    Neighboring matrices have the same inputs (q, k and v; gate and up), and then the row lies there already.
    """
    n, stride = data[N], data[INPUT_STRIDE]
    for s in range(data[SEGMENT_COUNT]):
        delta, _ = delta_of(segments[s, DELTA_OF])
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
                    rotate(x[:n], carray(floats(delta[SIGNS_V]), (n,)), largest_power(n))
                x[stride - 1] = x[:n].sum()


@njit(error_model="numpy")
def _inner_products(data, segments, begin, end):  # type: ignore[no-untyped-def]
    """Second step: `t = (x V) * scale`, a copy per plane, times the plane's weight; or x times the signs."""
    n, stride = data[N], data[INPUT_STRIDE]
    part, total = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta, terms = delta_of(segments[s, DELTA_OF])
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
                            plane = plane_of(term, i)
                            words = -(-n * plane[WIDTH] // 32)
                            tile = plane[V] + 4 * start * words
                            inner(plane[WIDTH], tile, min(LANES, rank - start), words, x, part.ctypes.data)
                            for j in range(LANES):
                                total[j] += part[j] * (1 << plane[FIRST])
                        t = carray(floats(data[T] + 4 * r * data[T_STRIDE]), (data[T_STRIDE],))
                        for i in range(term[PLANES]):
                            plane = plane_of(term, i)
                            for j in range(min(LANES, rank - start)):
                                t[plane[T_START] + start + j] = total[j] * scales[start + j] * (1 << plane[FIRST])
                number += 1


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
        delta, terms = delta_of(segments[s, DELTA_OF])
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
                                    plane = plane_of(term, i)
                                    if plane[WIDTH] == width:
                                        outer(
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
        delta, terms = delta_of(segments[s, DELTA_OF])
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
                        unrotate(out, carray(floats(delta[SIGNS_U]), (m,)), largest_power(m))
                    if delta[ROW_NUMBERS]:
                        numbers = carray(integers32(delta[ROW_NUMBERS]), (m,))
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


@cache
def add_worker() -> Any:
    """Add to y what the deltas of a batch make of x, in four steps."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        segments = carray(integers(data[SEGMENTS]), (data[SEGMENT_COUNT], SEGMENT))
        rows = carray(integers(data[ROWS]), (data[ROW_COUNT],))
        first = next_number(address + 8 * ARRIVED) * RUNS_PER_THREAD
        for step in range(4):
            for i in range(data[RUNS]):
                run = (first + i) % data[RUNS]
                if take(data, step, run):
                    begin, end = tasks_of(data, step, run)
                    if step == 0:
                        _read_inputs(data, segments, rows, begin, end)
                    elif step == 1:
                        _inner_products(data, segments, begin, end)
                    elif step == 2:
                        _outer_products(data, segments, begin, end)
                    else:
                        _write_outputs(data, segments, rows, begin, end)
                    finish(data, step)
            wait(data, step)

    return worker
