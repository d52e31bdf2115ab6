"""The steps that add to y what a batch's deltas make of x, compiled by Numba; the inner loops are in `vectors`.

Both factors of a product are integers: codes, and numbers in two bytes (`halve`), so a product is exact. What is left
of rounding is a part in 65,000 of a vector's largest number.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from deltacome.runtime.kernels.hadamard import rotate, unrotate
from deltacome.runtime.kernels.layout import COLUMNS, VECTOR
from deltacome.runtime.kernels.tables import (
    ARRIVED,
    COMPONENT,
    COUNT,
    DELTA_OF,
    FACTORED_ROWS,
    FIRST,
    FIRST_BIT,
    FLAGS,
    INPUT_BYTES,
    INPUT_SCALES,
    INPUT_STEP,
    INPUT_STRIDE,
    INPUTS,
    MOST_GROUPS,
    OUTPUT_STRIDE,
    OUTPUTS,
    PLACE,
    PLANE_COUNT,
    RANK,
    ROTATED_U,
    ROTATED_V,
    ROW_COUNT,
    ROW_NUMBERS,
    ROWS,
    RUN_LENGTH,
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
    SOURCES,
    START,
    STEPS,
    SUM_STRIDE,
    SUMS,
    T_BYTES,
    T_SCALES,
    T_STEP,
    WIDTH,
    M,
    N,
    U,
    V,
    X,
    Y,
    delta_of,
    finish,
    runs_of,
    take,
    tasks_of,
    wait,
)
from deltacome.runtime.kernels.vectors import (
    PARTS,
    VECTORS,
    bytes_,
    doubles,
    floats,
    integers,
    integers32,
    many_products,
    next_number,
    one_product,
    part_products,
)

CHUNK = 4096  # outputs that a thread takes at a time: whole blocks of the rotation
BLOCK = VECTORS * VECTOR  # columns that a thread takes at a time
LARGEST = 127 * 256  # of a number in two bytes


@njit(error_model="numpy")
def _equal(a, b):  # type: ignore[no-untyped-def]
    """Whether b begins with a."""
    different = 0
    for i in range(a.size):
        different += a[i] != b[i]
    return different == 0


@njit(error_model="numpy")
def halve(x, high, low):  # type: ignore[no-untyped-def]
    """Write x as `scale * (256 high + low)` in bytes with a sign; the scale and the sum of the integers.

    The scale is no number where x has one that is none, or that is infinite.
    """
    largest = np.float32(0)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
    total = np.float64(0)
    for i in range(x.size):
        total += x[i]
    if not np.isfinite(total):
        high[:] = 1
        return np.float64(np.nan), np.float64(1)
    if largest == 0:
        high[:], low[:] = 0, 0
        return np.float64(0), np.float64(0)
    inverse = np.float32(LARGEST) / largest
    count = np.int64(0)
    for i in range(x.size):
        value = np.int32(np.rint(x[i] * inverse))
        upper = (value + 128) >> 8
        high[i] = upper
        low[i] = value - (upper << 8)
        count += value
    return np.float64(largest) / LARGEST, np.float64(count)


@njit(error_model="numpy")
def _read_inputs(data, segments, rows, begin, end):  # type: ignore[no-untyped-def]
    """First step: each row of x, rotated where its delta asks for it, in two bytes a number.

    Neighboring matrices have the same inputs (q, k and v; gate and up), and then the row lies there already.
    """
    n, stride, step = data[N], data[INPUT_STRIDE], data[INPUT_STEP]
    for s in range(data[SEGMENT_COUNT]):
        delta, _ = delta_of(segments[s, DELTA_OF])
        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
            if not begin <= r < end:
                continue
            given = carray(floats(data[X] + 4 * rows[r] * n), (n,))
            last = carray(floats(data[INPUTS] + 4 * r * stride), (stride,))  # and at its end, whether it was rotated
            if last[stride - 1] != 1 + delta[ROTATED_V] or not _equal(given, last):
                last[:n] = given
                last[stride - 1] = 1 + delta[ROTATED_V]
                x = given
                if delta[ROTATED_V]:
                    x = given.copy()
                    rotate(x, carray(floats(delta[SIGNS_V]), (n,)))
                high = carray(bytes_(data[INPUT_BYTES] + 2 * r * step), (n,))
                low = carray(bytes_(data[INPUT_BYTES] + (2 * r + 1) * step), (n,))
                scales = carray(doubles(data[INPUT_SCALES] + 16 * r), (2,))
                scales[0], scales[1] = halve(x, high, low)


@njit(error_model="numpy")
def _add_sums(high, low, out, middle, row):  # type: ignore[no-untyped-def]
    """Add to `out` the sums of a row's two parts, `middle` taken from the codes. row: its scale and its sum."""
    constant, scale = middle * row[1], row[0]
    for i in range(out.size):
        value = 256.0 * high[i] + low[i]
        out[i] += np.float32(scale * (value - constant))


@njit(error_model="numpy")
def _multiply(width, words, count, columns, start, x, step, first, end, scales, by, group, out, out_stride, sums):  # type: ignore[no-untyped-def]
    """Add to rows of `out` what columns of a matrix of words make of rows of x, from column `start` on, BLOCK at most.

    x: the address of the first row's two parts, rows being 2 `step` bytes apart. first, end: the rows. scales: address
    of a row's scales and sums, `by` doubles a row, of which those from `2 group` on are meant.
    """
    tile = start // COLUMNS * COLUMNS
    stride, stop = min(COLUMNS, columns - tile), min(start + BLOCK, columns)
    own = words + 4 * (tile * count + start - tile)
    middle = ((1 << width) - 1) / 2
    r = first
    while r < end:
        taken = PARTS // 2 if end - r >= PARTS // 2 else 1
        if taken == 1 and stop - start == BLOCK:
            many_products(width, own, stride, count, x + 2 * r * step, step, sums.ctypes.data)
            row = carray(doubles(scales + 8 * (by * r + 2 * group)), (2,))
            _add_sums(
                sums[:BLOCK], sums[BLOCK:], carray(floats(out + 4 * (r * out_stride + start)), (BLOCK,)), middle, row
            )
        else:
            for place in range(0, stop - start, VECTOR):
                if taken == 1:
                    one_product(width, own + 4 * place, stride, count, x + 2 * r * step, step, sums.ctypes.data)
                else:
                    part_products(width, own + 4 * place, stride, count, x + 2 * r * step, step, sums.ctypes.data)
                known = min(VECTOR, stop - start - place)
                for i in range(taken):
                    row = carray(doubles(scales + 8 * (by * (r + i) + 2 * group)), (2,))
                    target = carray(floats(out + 4 * ((r + i) * out_stride + start + place)), (known,))
                    _add_sums(sums[2 * i * VECTOR :], sums[(2 * i + 1) * VECTOR :], target, middle, row)
        r += taken


@njit(error_model="numpy")
def _clear(address, first, end, stride, start, stop):  # type: ignore[no-untyped-def]
    for r in range(first, end):
        carray(floats(address + 4 * r * stride), (stop,))[start:] = 0


@njit(error_model="numpy")
def _inner_products(data, segments, begin, end, sums):  # type: ignore[no-untyped-def]
    """Second step: x times the planes of V; or x times the signs, which are the outputs."""
    n, x, step, scales = data[N], data[INPUT_BYTES], data[INPUT_STEP], data[INPUT_SCALES]
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta, groups = delta_of(segments[s, DELTA_OF])
        first, last = segments[s, START], segments[s, START] + segments[s, COUNT]
        if delta[SIGN_WORDS]:
            m, factor = delta[FACTORED_ROWS], np.float32(2) * carray(floats(delta[SIGN_SCALE]), (1,))[0]
            out, stride = data[OUTPUTS], data[OUTPUT_STRIDE]
            for start in range(0, m, BLOCK):
                if begin <= number < end:
                    stop = min(start + BLOCK, m)
                    _clear(out, first, last, stride, start, stop)
                    _multiply(
                        1,
                        delta[SIGN_WORDS],
                        -(-n // 32),
                        m,
                        start,
                        x,
                        step,
                        first,
                        last,
                        scales,
                        2,
                        0,
                        out,
                        stride,
                        sums,
                    )
                    for r in range(first, last):
                        carray(floats(out + 4 * r * stride), (stop,))[start:] *= factor
                number += 1
        for group in groups:
            width, columns, stride = group[WIDTH], group[PLANE_COUNT], data[SUM_STRIDE]
            out = data[SUMS] + 4 * group[FIRST]
            for start in range(0, columns, BLOCK):
                if begin <= number < end:
                    _clear(out, first, last, stride, start, min(start + BLOCK, columns))
                    _multiply(
                        width, group[V], -(-n * width // 32), columns, start, x, step, first, last, scales, 2, 0, out,
                        stride, sums,
                    )  # fmt: skip
                number += 1


@njit(error_model="numpy")
def _scale(data, segments, begin, end):  # type: ignore[no-untyped-def]
    """Third step: the sums of a component's planes, scaled, and for each plane again in two bytes a number."""
    for s in range(data[SEGMENT_COUNT]):
        delta, groups = delta_of(segments[s, DELTA_OF])
        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
            if not begin <= r < end:
                continue
            t = np.zeros(delta[RANK], np.float32)
            for group in groups:
                sums = carray(floats(data[SUMS] + 4 * (r * data[SUM_STRIDE] + group[FIRST])), (group[PLANE_COUNT],))
                place = 0
                for run in runs_of(group):
                    weight = np.float32(1 << run[FIRST_BIT])
                    for i in range(run[RUN_LENGTH]):
                        t[run[COMPONENT] + i] += weight * sums[place + i]
                    place += run[RUN_LENGTH]
            t *= carray(floats(delta[SCALE]), (delta[RANK],))
            for g in range(groups.shape[0]):
                group = groups[g]
                count = group[PLANE_COUNT]
                own = np.empty(count, np.float32)
                place = 0
                for run in runs_of(group):
                    weight = np.float32(1 << run[FIRST_BIT])
                    for i in range(run[RUN_LENGTH]):
                        own[place + i] = weight * t[run[COMPONENT] + i]
                    place += run[RUN_LENGTH]
                place = data[T_BYTES] + 2 * r * data[T_STEP] + group[PLACE]
                room = -(-count // 32) * 32
                high = carray(bytes_(place), (room,))
                low = carray(bytes_(place + data[T_STEP]), (room,))
                high[count:], low[count:] = 0, 0
                scales = carray(doubles(data[T_SCALES] + 16 * (MOST_GROUPS * r + g)), (2,))
                scales[0], scales[1] = halve(own, high[:count], low[:count])


@njit(error_model="numpy")
def _outer_products(data, segments, begin, end, sums):  # type: ignore[no-untyped-def]
    """Fourth step: the scaled sums times the planes of U."""
    out, stride = data[OUTPUTS], data[OUTPUT_STRIDE]
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta, groups = delta_of(segments[s, DELTA_OF])
        if delta[SIGN_WORDS]:
            continue
        m = delta[FACTORED_ROWS]
        first, last = segments[s, START], segments[s, START] + segments[s, COUNT]
        for start in range(0, m, BLOCK):
            if begin <= number < end:
                _clear(out, first, last, stride, start, min(start + BLOCK, m))
                for g in range(groups.shape[0]):
                    width, count = groups[g, WIDTH], groups[g, PLANE_COUNT]
                    _multiply(
                        width, groups[g, U], -(-count * width // 32), m, start, data[T_BYTES] + groups[g, PLACE],
                        data[T_STEP], first, last, data[T_SCALES], 2 * MOST_GROUPS, g, out, stride, sums,
                    )  # fmt: skip
            number += 1


@njit(error_model="numpy")
def _write_outputs(data, segments, rows, begin, end):  # type: ignore[no-untyped-def]
    """Last step: the outputs, rotated back, added to y."""
    number = 0
    for s in range(data[SEGMENT_COUNT]):
        delta, _ = delta_of(segments[s, DELTA_OF])
        m = delta[FACTORED_ROWS]
        for r in range(segments[s, START], segments[s, START] + segments[s, COUNT]):
            y = carray(floats(data[Y] + 4 * rows[r] * data[M]), (data[M],))
            for start in range(0, m, CHUNK):
                if begin <= number < end:
                    stop = min(start + CHUNK, m)
                    out = carray(floats(data[OUTPUTS] + 4 * r * data[OUTPUT_STRIDE]), (m,))[start:stop]
                    if delta[ROTATED_U]:
                        unrotate(out, carray(floats(delta[SIGNS_U]), (m,))[start:stop])
                    if delta[ROW_NUMBERS]:
                        numbers = carray(integers32(delta[ROW_NUMBERS]), (m,))
                        for i in range(out.size):
                            y[numbers[start + i]] += out[i]
                    else:
                        for i in range(out.size):
                            y[start + i] += out[i]
                number += 1


@cache
def add_worker() -> Any:
    """Add to y what the deltas of a batch make of x."""
    sources = SOURCES

    @cfunc(types.void(types.int64), cache=True)
    def worker(address):  # type: ignore[no-untyped-def]
        _ = sources
        data = carray(integers(address), (FLAGS,))
        segments = carray(integers(data[SEGMENTS]), (data[SEGMENT_COUNT], SEGMENT))
        rows = carray(integers(data[ROWS]), (data[ROW_COUNT],))
        sums = np.empty(max(2 * VECTORS, PARTS) * VECTOR, np.int32)
        first = next_number(address + 8 * ARRIVED) * RUNS_PER_THREAD
        for step in range(STEPS):
            for i in range(data[RUNS]):
                run = (first + i) % data[RUNS]
                if take(data, step, run):
                    begin, end = tasks_of(data, step, run)
                    if step == 0:
                        _read_inputs(data, segments, rows, begin, end)
                    elif step == 1:
                        _inner_products(data, segments, begin, end, sums)
                    elif step == 2:
                        _scale(data, segments, begin, end)
                    elif step == 3:
                        _outer_products(data, segments, begin, end, sums)
                    else:
                        _write_outputs(data, segments, rows, begin, end)
                    finish(data, step)
            wait(data, step)

    return worker
