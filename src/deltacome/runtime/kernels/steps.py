"""The steps of the CPU kernel, compiled by Numba; the inner loops are in `vectors`.

What Python hands over is a table of int64, a table per delta (`DELTA`, `TERM`, `PLANE`) and one row per delta of the
batch (`SEGMENT`), addresses being int64 too. A worker runs on every thread at once. The tasks of a step are numbered
and cut into runs, and a thread that takes a run goes through the numbers and does the tasks from `begin` to `end`.

Numba keeps what it compiled beside this file and compiles again when this file changes, but not when `vectors` does.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.runtime.kernels.vectors import (
    LANES,
    SHIFTS,
    butterfly,
    current_number,
    floats,
    inner,
    inner_1,
    integers,
    integers32,
    lane_hadamard,
    lift,
    next_number,
    outer,
    spread,
    yield_core,
)

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
def _delta(address):  # type: ignore[no-untyped-def]
    """The table of a delta and that of its terms."""
    delta = carray(integers(address), (DELTA,))
    return delta, carray(integers(address + 8 * DELTA), (delta[TERMS], TERM))


@njit(inline="always")
def _tasks(data, step, run):  # type: ignore[no-untyped-def]
    """The first task of a run, and that after its last."""
    return data[TASKS + step] * run // data[RUNS], data[TASKS + step] * (run + 1) // data[RUNS]


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
        delta, _ = _delta(segments[s, DELTA_OF])
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
        delta, terms = _delta(segments[s, DELTA_OF])
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
                            inner(plane[WIDTH], tile, min(LANES, rank - start), words, x, part.ctypes.data)
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
        delta, terms = _delta(segments[s, DELTA_OF])
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
        delta, terms = _delta(segments[s, DELTA_OF])
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
                    plane = _plane(term, p)
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
                if _take(data, step, run):
                    begin, end = _tasks(data, step, run)
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

    return worker


@cache
def expand_worker() -> Any:
    """Take the codes of a delta apart: V to X, U to Y."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        _, terms = _delta(data[SEGMENTS])
        for step in range(2):
            for run in range(data[RUNS]):
                if _take(data, step, run):
                    begin, end = _tasks(data, step, run)
                    if step == 0:
                        _expand_v(data, terms, begin, end)
                    else:
                        _expand_u(data, terms, begin, end)

    return worker


@cache
def rotate_worker() -> Any:
    """Rotate rows, or rotate them back."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        n = data[N]
        entry_signs = carray(floats(data[SEGMENTS]), (n,))
        for run in range(data[RUNS]):
            if _take(data, 0, run):
                begin, end = _tasks(data, 0, run)
                for row in range(begin, end):
                    x = carray(floats(data[X] + 4 * row * n), (n,))
                    if data[INVERSE]:
                        _unrotate(x, entry_signs, _power(n))
                    else:
                        _rotate(x, entry_signs, _power(n))

    return worker


@cache
def columns_worker() -> Any:
    """Entries of U at some places, as `reference.columns`."""

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        data = carray(integers(address), (FLAGS,))
        _, terms = _delta(data[SEGMENTS])
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
