"""The inner loops of the CPU kernel, written in LLVM's vectors.

Numba compiles loops over scalars and leaves it to LLVM to find vectors in them, which it does not in loops that cut
codes out of words. Here the vectors are explicit. A lane has a word of a column, in the bytes of which a shift and a
mask leave four codes, and these are multiplied with four bytes of the other factor by what the machine has for that:
VNNI, AVX2's `vpmaddubsw`, NEON's `sdot`.
"""

import platform
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from deltacome.runtime.kernels.layout import VECTOR, WIDTHS, bit_of

LANES = 8  # of floats

_I8, _I16, _I32, _I64, _F32 = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def instructions() -> str:
    """How this machine multiplies bytes: `avx512vnni`, `avxvnni`, `avx2`, `dotprod` (of ARM), or `plain`."""
    features = llvm.get_host_cpu_features()
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "dotprod" if features.get("dotprod") else "plain"
    return next((name for name in ("avx512vnni", "avxvnni", "avx2") if features.get(name)), "plain")


INSTRUCTIONS = instructions()
# Vectors of columns that are computed at once for the two parts of one row, and parts of rows for one vector: as many
# sums as there are registers for.
VECTORS, PARTS = (4, 8) if INSTRUCTIONS == "avx512vnni" else (2, 4)


def _address(builder: Any, start: Any, index: Any, kind: Any = _I32) -> Any:
    """Pointer to element `index` of an array at the address `start`."""
    return builder.gep(builder.inttoptr(start, kind.as_pointer()), [index])


def _load(builder: Any, pointer: Any, vector: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _all(value: int, vector: Any) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _codes(builder: Any, words: Any, width: int) -> list[Any]:
    """Words with a code of `width` bits in each byte, all codes of the words."""
    mask = _all(((1 << width) - 1) * 0x01010101, words.type)
    shifted = [builder.lshr(words, _all(first, words.type)) if first else words for first in range(0, 8, width)]
    return [part if width == 8 else builder.and_(part, mask) for part in shifted]


class _Vnni:
    """`vpdpbusd`: bytes without and with a sign, four products added to a sum."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.name = "llvm.x86.avx512.vpdpbusd.512" if lanes == 16 else "llvm.x86.avx512.vpdpbusd.256"

    def add(self, builder: Any, total: Any, codes: list[Any], x: list[Any], width: int) -> Any:
        for code, factor in zip(codes, x, strict=True):
            total = _call(builder, self.name, total.type, [total, code, factor])
        return total


class _Avx2:
    """`vpmaddubsw`: products in pairs, in 16 bits, which hold those of a whole word of codes of up to 4 bits."""

    lanes = 8

    def add(self, builder: Any, total: Any, codes: list[Any], x: list[Any], width: int) -> Any:
        if width == 8:
            low = _all(0x0F0F0F0F, total.type)
            halves = [builder.and_(codes[0], low), builder.and_(builder.lshr(codes[0], _all(4, total.type)), low)]
            sums = [(self._pairs(builder, half, x[0]), weight) for half, weight in zip(halves, (1, 16), strict=True)]
        else:
            pairs = [self._pairs(builder, code, factor) for code, factor in zip(codes, x, strict=True)]
            first = pairs[0]
            for other in pairs[1:]:
                first = builder.add(first, other)
            sums = [(first, 1)]
        for pair, weight in sums:
            weights = _all(weight, pair.type)
            total = builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", total.type, [pair, weights]))
        return total

    def _pairs(self, builder: Any, code: Any, x: Any) -> Any:
        in_bytes = [builder.bitcast(value, ir.VectorType(_I8, 32)) for value in (code, x)]
        return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_I16, 16), in_bytes)


class _Dotprod:
    """NEON's `sdot`, whose bytes all have a sign, so that codes of 8 bits go in halves."""

    lanes = 4

    def add(self, builder: Any, total: Any, codes: list[Any], x: list[Any], width: int) -> Any:
        if width < 8:
            for code, factor in zip(codes, x, strict=True):
                total = self._dot(builder, total, code, factor)
            return total
        low = _all(0x0F0F0F0F, total.type)
        high = builder.and_(builder.lshr(codes[0], _all(4, total.type)), low)
        high = builder.shl(self._dot(builder, _all(0, total.type), high, x[0]), _all(4, total.type))
        return builder.add(self._dot(builder, total, builder.and_(codes[0], low), x[0]), high)

    def _dot(self, builder: Any, total: Any, code: Any, x: Any) -> Any:
        in_bytes = [builder.bitcast(value, ir.VectorType(_I8, 16)) for value in (code, x)]
        return _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, *in_bytes])


class _Plain:
    """Byte by byte, in what any machine has."""

    lanes = 8

    def add(self, builder: Any, total: Any, codes: list[Any], x: list[Any], width: int) -> Any:
        for code, factor in zip(codes, x, strict=True):
            for first in range(0, 32, 8):
                one = builder.and_(builder.lshr(code, _all(first, total.type)), _all(255, total.type))
                other = builder.ashr(builder.shl(factor, _all(24 - first, total.type)), _all(24, total.type))
                total = builder.add(total, builder.mul(one, other))
        return total


MULTIPLIERS: dict[str, Any] = {
    "avx512vnni": _Vnni(16),
    "avxvnni": _Vnni(8),
    "avx2": _Avx2(),
    "dotprod": _Dotprod(),
    "plain": _Plain(),
}


def build_products(width: int, vectors: int, parts: int, multiplier: Any) -> Any:
    """Build `products(words, stride, count, x, x_step, out)`.

    The sums `sum_i x[part, i] * code[i, column]` of VECTOR * vectors neighboring columns of a matrix of words (count,
    stride); x: (parts, x_step) bytes with a sign, `count * 32 / width` of them used. words, x, out: addresses; out
    takes (parts, columns) integers of 32 bits.
    """
    lanes = multiplier.lanes
    ints = ir.VectorType(_I32, lanes)
    places = range(0, VECTOR * vectors, lanes)
    per_word = 8 // width  # four codes each

    @intrinsic
    def products(_: Any, words: Any, stride: Any, count: Any, x: Any, x_step: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            words, stride, count, x, x_step, out = arguments
            of = [(part, place) for part in range(parts) for place in places]
            sums = {key: cgutils.alloca_once_value(builder, _all(0, ints)) for key in of}
            for total in sums.values():
                builder.store(_all(0, ints), total)
            with cgutils.for_range(builder, count) as loop:
                row = builder.mul(loop.index, stride)
                codes = {}
                for place in places:
                    pointer = _address(builder, words, builder.add(row, _I64(place)))
                    codes[place] = _codes(builder, _load(builder, pointer, ints), width)
                first = builder.mul(loop.index, _I64(per_word))
                for part in range(parts):
                    start = builder.add(x, builder.mul(x_step, _I64(part)))
                    factors = [
                        _splat(builder, builder.load(_address(builder, start, builder.add(first, _I64(i)))), lanes)
                        for i in range(per_word)
                    ]
                    for place, own in codes.items():
                        total = sums[part, place]
                        builder.store(multiplier.add(builder, builder.load(total), own, factors, width), total)
            for (part, place), total in sums.items():
                target = _address(builder, out, _I64(part * VECTOR * vectors + place))
                _store(builder, builder.load(total), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return products


def _build_codes(width: int) -> Any:
    """Build `codes_WIDTH(words, out)`: the codes of VECTOR neighboring words, as floats (32 / width, VECTOR)."""

    @intrinsic
    def codes(_: Any, words: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            words, out = arguments
            ints = ir.VectorType(_I32, VECTOR)
            word = _load(builder, _address(builder, words, _I64(0)), ints)
            for i in range(32 // width):
                code = builder.and_(builder.lshr(word, _all(bit_of(i, width), ints)), _all((1 << width) - 1, ints))
                value = builder.sitofp(code, ir.VectorType(_F32, VECTOR))
                _store(builder, value, _address(builder, out, _I64(i * VECTOR), _F32))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return codes


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


floats, doubles, bytes_, integers, integers32 = map(
    _pointer, (types.float32, types.float64, types.int8, types.int64, types.int32)
)
yield_core = types.ExternalFunction("sched_yield", types.int32())

_MULTIPLIER = MULTIPLIERS[INSTRUCTIONS]
many_8, many_4, many_2, many_1 = (build_products(width, VECTORS, 2, _MULTIPLIER) for width in WIDTHS)
one_8, one_4, one_2, one_1 = (build_products(width, 1, 2, _MULTIPLIER) for width in WIDTHS)
parts_8, parts_4, parts_2, parts_1 = (build_products(width, 1, PARTS, _MULTIPLIER) for width in WIDTHS)
codes_8, codes_4, codes_2, codes_1 = map(_build_codes, WIDTHS)


@njit(error_model="numpy")
def many_products(width, words, stride, count, x, x_step, out):  # type: ignore[no-untyped-def]
    """Two parts of x times VECTORS vectors of columns."""
    if width == 1:
        many_1(words, stride, count, x, x_step, out)
    elif width == 2:
        many_2(words, stride, count, x, x_step, out)
    elif width == 4:
        many_4(words, stride, count, x, x_step, out)
    else:
        many_8(words, stride, count, x, x_step, out)


@njit(error_model="numpy")
def one_product(width, words, stride, count, x, x_step, out):  # type: ignore[no-untyped-def]
    """Two parts of x times one vector of columns."""
    if width == 1:
        one_1(words, stride, count, x, x_step, out)
    elif width == 2:
        one_2(words, stride, count, x, x_step, out)
    elif width == 4:
        one_4(words, stride, count, x, x_step, out)
    else:
        one_8(words, stride, count, x, x_step, out)


@njit(error_model="numpy")
def part_products(width, words, stride, count, x, x_step, out):  # type: ignore[no-untyped-def]
    """PARTS parts of x times one vector of columns."""
    if width == 1:
        parts_1(words, stride, count, x, x_step, out)
    elif width == 2:
        parts_2(words, stride, count, x, x_step, out)
    elif width == 4:
        parts_4(words, stride, count, x, x_step, out)
    else:
        parts_8(words, stride, count, x, x_step, out)


@njit(error_model="numpy")
def take_apart(width, words, out):  # type: ignore[no-untyped-def]
    """`codes_WIDTH`, whichever it is."""
    if width == 1:
        codes_1(words, out)
    elif width == 2:
        codes_2(words, out)
    elif width == 4:
        codes_4(words, out)
    else:
        codes_8(words, out)
