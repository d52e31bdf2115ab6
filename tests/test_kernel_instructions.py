"""The inner loop of the CPU kernel for each kind of processor, against plain products of integers."""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import njit

from deltacome.runtime.kernels import vectors
from deltacome.runtime.kernels.layout import VECTOR, WIDTHS, bit_of
from deltacome.runtime.kernels.vectors import MULTIPLIERS, build_products

FEATURES = llvm.get_host_cpu_features()
NEEDED = {"avx512vnni": "avx512vnni", "avxvnni": "avxvnni", "avx2": "avx2", "plain": None}


def compiled(width: int, columns: int, parts: int, name: str) -> Any:
    products = build_products(width, columns, parts, MULTIPLIERS[name])

    @njit
    def call(words: Any, x: Any, out: Any) -> Any:
        products(words.ctypes.data, words.shape[1], words.shape[0], x.ctypes.data, x.shape[1], out.ctypes.data)

    return call


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("columns", "parts"), [(vectors.VECTORS, 2), (1, vectors.PARTS)])
def test_sums_are_exact(name: str, width: int, columns: int, parts: int) -> None:
    if NEEDED[name] and not FEATURES.get(NEEDED[name]):
        pytest.skip(f"this processor has no {name}")
    rng = np.random.default_rng(0)
    count, per_word, stride = 37, 32 // width, columns * VECTOR + 3
    codes = rng.integers(0, 2**width, (count, per_word, stride))
    codes[:, :, 0], codes[:, :, 1] = 2**width - 1, 0  # the largest and the least sums
    words = sum(codes[:, i].astype(np.uint32) << np.uint32(bit_of(i, width)) for i in range(per_word))
    x = rng.integers(-128, 128, (parts, count * per_word)).astype(np.int8)
    x[0] = -128
    out = np.zeros((parts, columns * VECTOR), np.int32)
    compiled(width, columns, parts, name)(words.astype(np.uint32).view(np.int32), x, out)
    assert np.array_equal(out, x.astype(np.int64) @ codes.reshape(-1, stride)[:, : columns * VECTOR])


@pytest.mark.parametrize(
    ("name", "triple", "features", "instruction"),
    [
        ("dotprod", "aarch64-unknown-linux-gnu", "+dotprod", "sdot"),
        ("avxvnni", "x86_64-unknown-linux-gnu", "+avx2,+avxvnni", "vpdpbusd"),
        ("avx2", "x86_64-unknown-linux-gnu", "+avx2", "vpmaddubsw"),
    ],
)
@pytest.mark.parametrize("width", WIDTHS)
def test_instructions(name: str, triple: str, features: str, instruction: str, width: int) -> None:
    """No machine of a kind may be here, but its code can be made, and it must have what the kind is for."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this llvmlite makes no code for {triple}")
    multiplier = MULTIPLIERS[name]
    module, ints = ir.Module(), ir.VectorType(ir.IntType(32), multiplier.lanes)
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ints, [ints] * (2 + 8 // width)), "step")
    builder = ir.IRBuilder(function.append_basic_block())
    total, words, *x = function.args
    builder.ret(multiplier.add(builder, total, vectors._codes(builder, words, width), x, width))
    machine = target.create_target_machine(features=features, opt=2)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    is_in_halves = width == 8 and name != "avxvnni"
    assert assembly.count(instruction) == (2 if is_in_halves else 8 // width)
