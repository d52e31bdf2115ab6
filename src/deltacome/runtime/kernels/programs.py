"""What runs on the GPU, compiled by Triton: the five launches that `triton` makes, and what they have in common.

Numbers of the tables are int64, addresses among them; those in units of 16 bytes so that the compiler knows how they
are aligned.
"""

import torch
import triton
import triton.language as tl

from deltacome.format.rotation import BLOCK

# Numbers of a delta's table, of a group in it, and of a segment.
PLANES, OUTPUTS, IS_SIGN, NUMBERS, SIBLINGS, SIBLING_COUNT, FACTORS, SIGNS, TURNS = (tl.constexpr(i) for i in range(9))
GROUPS, GROUP = tl.constexpr(9), tl.constexpr(6)
START, COUNT, V, V_UNITS, U, U_UNITS = (tl.constexpr(i) for i in range(6))
DELTA, X_FIRST, FIRST, ROWS, COLUMN = (tl.constexpr(i) for i in range(5))
SEGMENT = tl.constexpr(5)
SIDE = tl.constexpr(BLOCK)
LARGEST = tl.constexpr(127 * 128)  # of a number in two parts, 128 high + low
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
CHUNK = tl.constexpr(1024)


@triton.jit
def _turned(x, turns, block, last, has_rest: tl.constexpr, is_exact: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of entries (blocks, SIDE), by their numbers, through their Hadamard matrices.

    is_exact: 11 bits of a mantissa are all that x has.
    """
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power > 0, power, 1.0)
    x = x / power  # is in range of half precision, and what is lost there is small beside the largest
    y = _times(x, turns, is_exact)
    if has_rest:
        rest = _times(x, turns + (SIDE + 1) * SIDE, is_exact)
        y = tl.where((block == last)[:, None], rest, y)
    return y * power


@triton.jit
def _times(x, turn, is_exact: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIDE)
    matrix = tl.load(turn + i[:, None] * SIDE + i[None])
    head = x.to(tl.float16)
    y = tl.dot(head, matrix)
    if not is_exact:
        y = tl.dot((x - head.to(tl.float32)).to(tl.float16), matrix, y)
    return y * tl.exp2(-0.5 * tl.load(turn + SIDE * SIDE + i).to(tl.float32))[None]


@triton.jit
def _in_parts(value, largest):  # type: ignore[no-untyped-def]
    """Integers of a value, and their two parts of 8 bits; `largest` is that of all values."""
    inverse = tl.where(largest > 0, LARGEST / largest, 0.0)
    number = tl.floor(value * inverse + 0.5).to(tl.int32)
    high = (number + 64) >> 7
    return number, high, number - high * 128


@triton.jit
def _of(delta, number):  # type: ignore[no-untyped-def]
    """A number of a delta's table; 0 where there is no delta."""
    return tl.load(delta + number, mask=delta.to(tl.int64) != 0, other=0)


@triton.jit(do_not_specialize=["n", "length", "slices", "room", "x_room"])
def prepare(  # type: ignore[no-untyped-def]
    segments, owner, x, stride, rows, rotated, signs, turns, out, scales, sums, n, length, slices, room, x_room,
    blocks: tl.constexpr,
):  # fmt: skip
    """A row of x, rotated or not, in two parts of `length` bytes with zeros behind the n numbers.

    slices: 0, or how many have to be asked whether they want the row so.
    """
    i = tl.program_id(1) * x_room + tl.program_id(0)
    wanted = 1 if slices == 0 else 0
    for s in range(slices):
        segment = segments + tl.load(owner + s * room + tl.program_id(0)) * SEGMENT
        is_rotated = (tl.load(segment + X_FIRST) >= x_room).to(tl.int32)
        wanted += ((tl.load(segment + DELTA) != 0) & (is_rotated == tl.program_id(1))).to(tl.int32)
    if wanted == 0:
        return
    block = tl.arange(0, blocks)
    place = block[:, None] * SIDE + tl.arange(0, SIDE)[None]
    value = tl.load(x + tl.load(rows + i) * stride + place, mask=place < n, other=0.0)
    is_exact: tl.constexpr = value.dtype != tl.float32
    value = value.to(tl.float32)
    if tl.load(rotated + i) != 0:
        value *= tl.load(signs + place, mask=place < n, other=0.0)
        if n % SIDE == 0:
            value = _turned(value, turns, block, n // SIDE, False, is_exact)
        else:
            value = _turned(value, turns, block, n // SIDE, True, is_exact)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    number, high, low = _in_parts(value, largest)
    target = out + i.to(tl.int64) * 2 * length + place
    tl.store(target, high.to(tl.int8), mask=place < length)
    tl.store(target + length, low.to(tl.int8), mask=place < length)
    # No number where one of the row's is none, or infinite: then 0 times it is none.
    bad = tl.sum(tl.sum(value * 0.0, axis=1), axis=0)
    tl.store(scales + i, largest / LARGEST + bad)
    tl.store(sums + i, tl.sum(tl.sum(number, axis=1), axis=0))


@triton.jit
def _cut(bytes_, place: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes at a place of each half byte, times 2^(place width)."""
    mask: tl.constexpr = ((1 << width) - 1) << (place * width)
    if not HAS_PTX:
        cut = bytes_ & mask
    # Four at once: the compiler would cut them one by one.
    elif mask == 1:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x01010101;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 2:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x02020202;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 4:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x04040404;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 8:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x08080808;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 3:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x03030303;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    elif mask == 12:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0c0c0c0c;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    else:
        cut = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)
    return cut


@triton.jit
def _upper_half(bytes_):  # type: ignore[no-untyped-def]
    """Bytes whose lower half is the upper half of these."""
    if not HAS_PTX:
        return bytes_ >> 4
    return tl.inline_asm_elementwise("shr.u32 $0, $1, 4;", "=r,r", [bytes_], tl.int8, is_pure=True, pack=4)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    group, side: tl.constexpr, width: tl.constexpr, first, known, x, stride, parts_known, begin, end,
    columns: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """The integers `sum_k code[m, k] x[n, k]` of columns m from `first` on and parts n of rows: (columns, parts). There
    are `known` columns and `parts_known` parts.

    group: of a delta's table, with the codes' address at `side`. A column's codes are `units * 16` bytes, of which
    those from `begin` to `end` count, in steps. The codes at a place of all bytes go with numbers of x that lie
    together.
    """
    codes = (tl.load(group + side) * 16).to(tl.pointer_type(tl.int8))
    room = tl.load(group + side + 1).to(tl.int32) * 16
    places: tl.constexpr = 4 // width  # in half a byte
    k = tl.arange(0, step)
    m = tl.minimum(first + tl.arange(0, columns), first + known - 1)  # what comes of others is not used
    n = tl.minimum(tl.arange(0, parts), parts_known - 1)
    codes += m[:, None].to(tl.int64) * room + k[None]
    x += n[None] * stride + k[:, None]
    a0 = tl.zeros((columns, parts), tl.int32)
    a1 = tl.zeros((columns, parts), tl.int32)
    a2 = tl.zeros((columns, parts), tl.int32)
    a3 = tl.zeros((columns, parts), tl.int32)
    for at in range(begin * step, tl.minimum(end * step, room), step):
        # Behind a column's last byte the codes are zero, whatever number of x they are multiplied with.
        bytes_ = tl.load(codes + at, mask=(k < room - at)[None], other=0)
        for half in tl.static_range(2):
            own = _upper_half(bytes_) if half else bytes_
            source = x + (at + half * places * room)
            a0 = tl.dot(_cut(own, 0, width), tl.load(source), a0, out_dtype=tl.int32)
            if width < 4:
                a1 = tl.dot(_cut(own, 1, width), tl.load(source + room), a1, out_dtype=tl.int32)
            if width == 1:
                a2 = tl.dot(_cut(own, 2, width), tl.load(source + 2 * room), a2, out_dtype=tl.int32)
                a3 = tl.dot(_cut(own, 3, width), tl.load(source + 3 * room), a3, out_dtype=tl.int32)
    return a0 + (a1 >> width) + (a2 >> (2 * width)) + (a3 >> (3 * width))


@triton.jit
def _segment(segments, used, room):  # type: ignore[no-untyped-def]
    """A program's segment: of each slice there are `used`, and room for more."""
    i = tl.program_id(1)
    return segments + (i // used * room + i % used) * SEGMENT


@triton.jit(do_not_specialize=["used", "room", "length_units", "plane_units", "count", "splits"])
def inner(  # type: ignore[no-untyped-def]
    segments, used, room, x, out, length_units, plane_units, count, splits, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    """Some of the planes of V times the parts of the rows of a segment, over a part of the inputs."""
    segment = _segment(segments, used, room)
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    split = tl.program_id(2)
    known = _of(delta, PLANES).to(tl.int32)
    # Once, but for deltas of more planes than the launch was made for. What is loaded in it stays in it: or registers,
    # all in use, are spilled.
    start, stride = tl.program_id(0) * columns, tl.num_programs(0) * columns
    for first in tl.range(start, known, stride, num_stages=1, disable_licm=True):
        length, planes = length_units * SIDE, plane_units * SIDE
        parts_known = 2 * tl.load(segment + ROWS).to(tl.int32)
        own = x + tl.load(segment + X_FIRST) * 2 * length
        groups = delta + GROUPS
        if first < tl.load(groups + GROUP + START) * SIDE:
            total = _part_of_inner(groups, 4, first, own, length, parts_known, split, splits, columns, step, parts)
        elif first < tl.load(groups + 2 * GROUP + START) * SIDE:
            group = groups + GROUP
            total = _part_of_inner(group, 2, first, own, length, parts_known, split, splits, columns, step, parts)
        else:
            group = groups + 2 * GROUP
            total = _part_of_inner(group, 1, first, own, length, parts_known, split, splits, columns, step, parts)
        row = (split * count + tl.load(segment + FIRST)) * 2 + tl.arange(0, parts)
        target = out + row.to(tl.int64)[None] * planes + (first + tl.arange(0, columns))[:, None]
        tl.store(target, total, mask=(tl.arange(0, parts) < parts_known)[None])


@triton.jit
def _part_of_inner(  # type: ignore[no-untyped-def]
    group, width: tl.constexpr, first, x, length, parts_known, split, splits, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    start = tl.load(group + START).to(tl.int32) * SIDE
    known = tl.load(group + COUNT).to(tl.int32) - (first - start)
    steps = tl.cdiv(tl.load(group + V_UNITS).to(tl.int32) * 16, step)
    steps = tl.where(known > 0, steps, 0)
    begin, end = steps * split // splits, steps * (split + 1) // splits
    return _products(group, V, width, first - start, known, x, length, parts_known, begin, end, columns, step, parts)


@triton.jit(do_not_specialize=["planes", "outputs", "count", "splits", "room"])
def scale(  # type: ignore[no-untyped-def]
    segments, owner, x_scale, x_sum, sums, values, parts, scales, part_sums, product, planes, outputs, count, splits,
    room,
):  # fmt: skip
    """Of a row the sums of each component's planes, scaled, and for each plane again in parts."""
    i = tl.program_id(1).to(tl.int64) * room + tl.program_id(0)
    segment = segments + tl.load(owner + i) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    own_planes = _of(delta, PLANES).to(tl.int32)
    if own_planes == 0:
        return
    siblings = tl.load(delta + SIBLINGS).to(tl.pointer_type(tl.int32))
    sibling_count = tl.load(delta + SIBLING_COUNT).to(tl.int32)
    factors = tl.load(delta + FACTORS).to(tl.pointer_type(tl.float32))
    start2 = tl.load(delta + GROUPS + GROUP + START).to(tl.int32) * SIDE
    start1 = tl.load(delta + GROUPS + 2 * GROUP + START).to(tl.int32) * SIDE
    x_row = tl.load(segment + X_FIRST) + i - tl.load(segment + FIRST)
    own_scale, own_sum = tl.load(x_scale + x_row), tl.load(x_sum + x_row).to(tl.int64)
    is_sign = tl.load(delta + IS_SIGN) != 0
    most4 = 0.0
    most2 = 0.0
    most1 = 0.0
    for first in range(0, own_planes, CHUNK):
        place = first + tl.arange(0, CHUNK)
        inside = place < own_planes
        value = tl.zeros((CHUNK,), tl.float32)
        for s in range(sibling_count):
            at = tl.load(siblings + place * sibling_count + s, mask=inside, other=-1)
            known = at >= 0
            total = tl.zeros((CHUNK,), tl.int64)
            for split in range(splits):
                source = sums + (split * count + i) * 2 * planes + at
                total += tl.load(source, mask=known, other=0).to(tl.int64) * 256
                total += tl.load(source + planes, mask=known, other=0).to(tl.int64) * 2
            # Twice the product, since the middle of the codes is no integer.
            middle = tl.where(at < start2, 15, tl.where(at < start1, 3, 1)).to(tl.int64)
            weight = tl.load(factors + at, mask=known, other=0.0)
            value += weight * 0.5 * (total - middle * own_sum).to(tl.float32)
        value *= own_scale * tl.load(factors + own_planes + place, mask=inside, other=0.0)
        if is_sign:
            tl.store(product + i * outputs + place, value, mask=place < tl.load(delta + OUTPUTS))
        else:
            tl.store(values + i * planes + place, value, mask=inside)
            size = tl.abs(value)
            most4 = tl.maximum(most4, tl.max(tl.where(place < start2, size, 0.0), axis=0))
            most2 = tl.maximum(most2, tl.max(tl.where((place >= start2) & (place < start1), size, 0.0), axis=0))
            most1 = tl.maximum(most1, tl.max(tl.where(place >= start1, size, 0.0), axis=0))
    if not is_sign:
        tl.debug_barrier()
        sum4 = 0
        sum2 = 0
        sum1 = 0
        for first in range(0, own_planes, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < own_planes
            value = tl.load(values + i * planes + place, mask=inside, other=0.0)
            most = tl.where(place < start2, most4, tl.where(place < start1, most2, most1))
            number, high, low = _in_parts(value, most)
            target = parts + i * 2 * planes + place
            tl.store(target, high.to(tl.int8), mask=inside)
            tl.store(target + planes, low.to(tl.int8), mask=inside)
            sum4 += tl.sum(tl.where(place < start2, number, 0), axis=0)
            sum2 += tl.sum(tl.where((place >= start2) & (place < start1), number, 0), axis=0)
            sum1 += tl.sum(tl.where(place >= start1, number, 0), axis=0)
        bad = own_scale * 0.0  # no number if the row's scale is none
        tl.store(scales + i * 3, most4 / LARGEST + bad)
        tl.store(scales + i * 3 + 1, most2 / LARGEST + bad)
        tl.store(scales + i * 3 + 2, most1 / LARGEST + bad)
        tl.store(part_sums + i * 3, sum4)
        tl.store(part_sums + i * 3 + 1, sum2)
        tl.store(part_sums + i * 3 + 2, sum1)


@triton.jit(do_not_specialize=["used", "room", "plane_units", "outputs"])
def outer(  # type: ignore[no-untyped-def]
    segments, used, room, x, scales, sums, product, plane_units, outputs, columns: tl.constexpr, step: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    """Some outputs of the rows of a segment: the scaled sums times all planes of U."""
    segment = _segment(segments, used, room)
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    first = tl.program_id(0) * columns
    known = _of(delta, OUTPUTS).to(tl.int32) - first
    if (known > 0) & (_of(delta, IS_SIGN) == 0):
        planes = plane_units * SIDE
        row, rows = tl.load(segment + FIRST), tl.load(segment + ROWS).to(tl.int32)
        own = x + row * 2 * planes
        groups = delta + GROUPS
        total = _part_of_outer(groups, 4, 0, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        group = groups + GROUP
        total += _part_of_outer(group, 2, 1, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        group += GROUP
        total += _part_of_outer(group, 1, 2, first, known, own, planes, rows, scales, sums, row, columns, step, parts)
        both = tl.sum(tl.reshape(total, (columns, parts // 2, 2)), axis=2)
        r, m = tl.arange(0, parts // 2), tl.arange(0, columns)
        target = product + (row + r)[None] * outputs + (first + m)[:, None]
        tl.store(target, both, mask=(r < rows)[None] & (m < known)[:, None])


@triton.jit
def _part_of_outer(  # type: ignore[no-untyped-def]
    group, width: tl.constexpr, number: tl.constexpr, first, known, x, planes, rows, scales, sums, row,
    columns: tl.constexpr, step: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """What a group's planes add, the two parts of a row by themselves."""
    steps = tl.cdiv(tl.load(group + U_UNITS).to(tl.int32) * 16, step)
    own = x + tl.load(group + START).to(tl.int32) * SIDE
    total = _products(group, U, width, first, known, own, planes, 2 * rows, 0, steps, columns, step, parts)
    n = tl.arange(0, parts)
    place = (row + n // 2) * 3 + number
    is_known = n < 2 * rows
    scale = tl.load(scales + place, mask=is_known, other=0.0)
    middle = ((1 << width) - 1) * 0.5 * tl.load(sums + place, mask=is_known, other=0).to(tl.float32)
    is_high = n % 2 == 0
    value = total.to(tl.float32) * tl.where(is_high, 128.0, 1.0)[None] - tl.where(is_high, middle, 0.0)[None]
    return value * scale[None]


@triton.jit(do_not_specialize=["start", "outputs", "room"])
def finish(segments, owner, rows, product, start, outputs, room, y, stride):  # type: ignore[no-untyped-def]
    """Some outputs of a row rotated back, and added to y."""
    i = tl.program_id(2).to(tl.int64) * room + start + tl.program_id(1)
    segment = segments + tl.load(owner + i) * SEGMENT
    delta = tl.load(segment + DELTA).to(tl.pointer_type(tl.int64))
    own = _of(delta, OUTPUTS).to(tl.int32)
    first = tl.program_id(0) * 16
    if first * SIDE < own:
        block = first + tl.arange(0, 16)
        place = block[:, None] * SIDE + tl.arange(0, SIDE)[None]
        known = place < own
        value = tl.load(product + i * outputs + place, mask=known, other=0.0)
        turns = (tl.load(delta + TURNS) * 16).to(tl.pointer_type(tl.float16))
        if turns.to(tl.int64) != 0:
            signs = (tl.load(delta + SIGNS) * 16).to(tl.pointer_type(tl.float32))
            if own % SIDE == 0:
                value = _turned(value, turns, block, own // SIDE, False, False)
            else:
                value = _turned(value, turns, block, own // SIDE, True, False)
            value *= tl.load(signs + place, mask=known, other=0.0)
        numbers = tl.load(delta + NUMBERS).to(tl.pointer_type(tl.int32))
        target = place.to(tl.int64)
        if numbers.to(tl.int64) != 0:
            target = tl.load(numbers + place, mask=known, other=0).to(tl.int64)
        target = y + tl.load(rows + i) * stride + tl.load(segment + COLUMN) + target
        old = tl.load(target, mask=known, other=0.0)
        tl.store(target, (old.to(tl.float32) + value).to(old.dtype), mask=known)
