"""The two inner loops of the CPU kernel, written in LLVM's vectors.

Numba compiles loops over scalars and leaves it to LLVM to find vectors in them, which it does not in loops that cut
codes out of words. Here the vectors are explicit, a word a lane, and LLVM turns them into what the machine has:
AVX2 or NEON. A word holds `32 // width` codes; the loops over those are unrolled.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from deltacome.runtime.kernels.packed import TILE

LANES = TILE
SHIFTS = 8  # sums that `outer` keeps in registers at once

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_FLOATS, [0.0] * LANES)


def _address(builder: Any, start: Any, index: Any, kind: Any = _I32) -> Any:
    """Pointer to element `index` of an array of 4-byte elements at the address `start`."""
    return builder.gep(builder.inttoptr(start, kind.as_pointer()), [index])


def _load(builder: Any, pointer: Any, vector: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


def _codes(builder: Any, words: Any, shift: int, width: int) -> Any:
    """The codes that start at bit `shift` of the words, as floats."""
    if shift:
        words = builder.lshr(words, ir.Constant(_INTS, [shift] * LANES))
    return builder.sitofp(builder.and_(words, ir.Constant(_INTS, [(1 << width) - 1] * LANES)), _FLOATS)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _inner(width: int) -> Any:
    """Build `inner_WIDTH(words, stride, count, x, out)`.

    The sums `sum_i x[i] * code[i, lane]` of LANES neighboring columns of a matrix of words (count, stride); x has
    `count * 32 / width` entries. words, x, out: addresses; out takes LANES floats.
    """
    per_word = 32 // width

    @intrinsic
    def inner(_: Any, words: Any, stride: Any, count: Any, x: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            words, stride, count, x, out = arguments
            sums = [cgutils.alloca_once_value(builder, _ZERO) for _ in range(4)]  # four, for they must wait otherwise
            for total in sums:
                builder.store(_ZERO, total)
            with cgutils.for_range(builder, count) as loop:
                word = _load(builder, _address(builder, words, builder.mul(loop.index, stride)), _INTS)
                first = builder.mul(loop.index, _I64(per_word))
                for i in range(per_word):
                    factor = builder.load(_address(builder, x, builder.add(first, _I64(i)), _F32))
                    total = sums[i % 4]
                    code = _codes(builder, word, width * i, width)
                    value = _multiply_add(builder, _splat(builder, factor, _FLOATS), code, builder.load(total))
                    builder.store(value, total)
            a, b, c, d = (builder.load(total) for total in sums)
            _store(builder, builder.fadd(builder.fadd(a, b), builder.fadd(c, d)), _address(builder, out, _I64(0), _F32))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return inner


def _outer(width: int) -> Any:
    """Build `outer_WIDTH(words, stride, count, shift, t, out, out_stride, fresh)`.

    For LANES neighboring words of each row and the SHIFTS codes of each from bit `shift` on:
    `out[i, lane] = sum_k t[k] * code[k, lane, i]`, added to what is there unless `fresh`.
    words: a matrix of words (count, stride). out: (SHIFTS, out_stride) floats, fewer where a word has fewer codes.
    """
    shifts = min(32 // width, SHIFTS)

    @intrinsic
    def outer(
        _: Any, words: Any, stride: Any, count: Any, shift: Any, t: Any, out: Any, out_stride: Any, fresh: Any
    ) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            words, stride, count, shift, t, out, out_stride, fresh = arguments
            start = _splat(builder, builder.trunc(shift, _I32), _INTS)
            is_fresh = builder.icmp_signed("!=", fresh, _I64(0))
            places = [_address(builder, out, builder.mul(_I64(i), out_stride), _F32) for i in range(shifts)]
            sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(shifts)]
            for place, total in zip(places, sums, strict=True):
                builder.store(builder.select(is_fresh, _ZERO, _load(builder, place, _FLOATS)), total)
            with cgutils.for_range(builder, count) as loop:
                word = _load(builder, _address(builder, words, builder.mul(loop.index, stride)), _INTS)
                word = builder.lshr(word, start)
                factor = _splat(builder, builder.load(_address(builder, t, loop.index, _F32)), _FLOATS)
                for i, total in enumerate(sums):
                    code = _codes(builder, word, width * i, width)
                    builder.store(_multiply_add(builder, factor, code, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                _store(builder, builder.load(total), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return outer


def _butterfly(_: Any, a: Any, b: Any) -> Any:
    """`butterfly(a, b)`: LANES floats at each of the two addresses become their sum and their difference."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        places = [_address(builder, argument, _I64(0), _F32) for argument in arguments]
        first, second = (_load(builder, place, _FLOATS) for place in places)
        _store(builder, builder.fadd(first, second), places[0])
        _store(builder, builder.fsub(first, second), places[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _lane_hadamard(_: Any, x: Any) -> Any:
    """`lane_hadamard(x)`: the Hadamard transform, not normalized, of the LANES floats at the address x."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        place = _address(builder, arguments[0], _I64(0), _F32)
        value = _load(builder, place, _FLOATS)
        width = 1
        while width < LANES:
            order = ir.Constant(_INTS, [lane ^ width for lane in range(LANES)])
            partner = builder.shuffle_vector(value, ir.Constant(_FLOATS, ir.Undefined), order)
            sign = ir.Constant(_FLOATS, [-1.0 if lane & width else 1.0 for lane in range(LANES)])
            value = builder.fadd(partner, builder.fmul(sign, value))
            width *= 2
        _store(builder, value, place)
        return context.get_dummy_value()

    return types.void(types.int64), generate


butterfly, lane_hadamard = intrinsic(_butterfly), intrinsic(_lane_hadamard)


def _lift(width: int) -> Any:
    """Build `lift_WIDTH(words, out, stride, weight)`.

    The codes of LANES neighboring words, times `weight`, are added to `32 / width` rows of LANES floats that lie
    `stride` floats apart.
    """

    @intrinsic
    def lift(_: Any, words: Any, out: Any, stride: Any, weight: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            words, out, stride, weight = arguments
            word = _load(builder, _address(builder, words, _I64(0)), _INTS)
            factor = _splat(builder, weight, _FLOATS)
            for i in range(32 // width):
                place = _address(builder, out, builder.mul(_I64(i), stride), _F32)
                code = _codes(builder, word, width * i, width)
                _store(builder, _multiply_add(builder, factor, code, _load(builder, place, _FLOATS)), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.float32), generate

    return lift


def _spread(width: int) -> Any:
    """Build `spread_WIDTH(word, out, weight)`: the codes of one word, times `weight`, are added to as many floats."""
    count = min(32 // width, LANES)
    ints, floats_ = ir.VectorType(_I32, count), ir.VectorType(_F32, count)

    @intrinsic
    def spread(_: Any, word: Any, out: Any, weight: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            word, out, weight = arguments
            undefined = ir.Constant(ints, ir.Undefined)
            one = builder.insert_element(undefined, builder.load(_address(builder, word, _I64(0))), _I32(0))
            word = builder.shuffle_vector(one, undefined, ir.Constant(ints, [0] * count))
            undefined = ir.Constant(floats_, ir.Undefined)
            one = builder.insert_element(undefined, weight, _I32(0))
            factor = builder.shuffle_vector(one, undefined, ir.Constant(ints, [0] * count))
            for first in range(0, 32 // width, count):
                shifts = ir.Constant(ints, [width * (first + i) for i in range(count)])
                codes = builder.and_(builder.lshr(word, shifts), ir.Constant(ints, [(1 << width) - 1] * count))
                place = _address(builder, out, _I64(first), _F32)
                product = builder.fmul(factor, builder.sitofp(codes, floats_))
                _store(builder, builder.fadd(product, _load(builder, place, floats_)), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return spread


inner_1, inner_2, inner_4, inner_8, inner_16 = map(_inner, (1, 2, 4, 8, 16))
outer_1, outer_2, outer_4, outer_8, outer_16 = map(_outer, (1, 2, 4, 8, 16))
lift_1, lift_2, lift_4, lift_8, lift_16 = map(_lift, (1, 2, 4, 8, 16))
spread_1, spread_2, spread_4, spread_8, spread_16 = map(_spread, (1, 2, 4, 8, 16))


@intrinsic
def next_number(_: Any, counter: Any) -> Any:
    """`next_number(counter)`: the int64 at the address `counter`, one more afterwards; no two threads get the same."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _address(builder, arguments[0], _I64(0), _I64), _I64(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def current_number(_: Any, counter: Any) -> Any:
    """`current_number(counter)`: the int64 at the address `counter` as other threads left it."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.load_atomic(_address(builder, arguments[0], _I64(0), _I64), "seq_cst", 8)

    return types.int64(types.int64), generate


def _pointer(element: Any) -> Any:
    """Build the function that makes an address a pointer to elements of a type."""

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats, integers, integers32 = map(_pointer, (types.float32, types.int64, types.int32))
yield_core = types.ExternalFunction("sched_yield", types.int32())


@njit(error_model="numpy")
def inner(width, words, stride, count, x, out):  # type: ignore[no-untyped-def]
    """`inner_WIDTH`, whichever it is."""
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
def outer(width, words, stride, count, shift, t, out, out_stride, fresh):  # type: ignore[no-untyped-def]
    """`outer_WIDTH`, whichever it is."""
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
def lift(width, words, out, stride, weight):  # type: ignore[no-untyped-def]
    """`lift_WIDTH`, whichever it is."""
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
def spread(width, word, out, weight):  # type: ignore[no-untyped-def]
    """`spread_WIDTH`, whichever it is."""
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
