"""What a GPU will run of the kernel: the machine code for an architecture, counted without such a GPU at hand.

`python -m deltacome.benchmark.compiled 90` prints a table for an H100. Triton brings the compiler and the disassembler.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltacome.benchmark.results import Row, Table
from deltacome.runtime.kernels import plans, programs

COLUMNS = {
    "kernel": "kernel",
    "parts": "rows of a segment, twice",
    "registers": "registers",
    "spilled": "spilled",
    "shared": "shared memory, bytes",
    "instructions": "instructions",
    "integer": "integer ones a word of codes, by width",
}
POINTERS = {
    "segments": "*i64", "owner": "*i64", "x_row": "*i64", "rows": "*i64", "rotated": "*i64",
    "signs": "*fp32", "turns": "*fp16", "values": "*fp32", "product": "*fp32", "x_scale": "*fp32", "parts": "*i8",
}  # fmt: skip
ALU = {"LOP3", "IADD3", "SHF", "LEA", "ISETP", "PRMT", "SEL", "VIADD", "IMNMX", "I2F", "P2R", "R2P", "PLOP3"}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9_]+)(?:\.\S+)?\s*([^;]*);")


def compiled(architecture: int) -> list[Row]:
    """The kernels as they are compiled for an architecture of NVIDIA's, such as 90: a row each."""
    few = {"columns": plans.FEW[0], "step": plans.FEW[1]}
    many = {"columns": plans.MANY[0], "step": plans.MANY[1]}
    found = []
    for parts, shape, warps in ((8, few, plans.FEW[2]), (16, few, plans.FEW[2]), (64, many, plans.MANY[2])):
        for kernel, pointers in (
            (programs.inner, {"x": "*i8", "out": "*i32"}),
            (programs.outer, {"x": "*i8", "scales": "*fp32", "sums": "*i32"}),
        ):
            found.append(_row(architecture, kernel, pointers, {**shape, "parts": parts}, warps))
    prepare = {"x": "*bf16", "out": "*i8", "scales": "*fp32", "sums": "*i32"}
    found.append(_row(architecture, programs.prepare, prepare, {"blocks": 32}, 8))
    found.append(_row(architecture, programs.prepare, prepare, {"blocks": 128}, 16))
    scale = {"sums": "*i32", "x_sum": "*i32", "scales": "*fp32", "part_sums": "*i32"}
    found.append(_row(architecture, programs.scale, scale, {}, 4))
    found.append(_row(architecture, programs.finish, {"y": "*bf16"}, {}, 8))
    return found


def _row(architecture: int, kernel: Any, pointers: dict[str, str], constants: dict[str, int], warps: int) -> Row:
    known = POINTERS | pointers
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    numbers = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(numbers[name],): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for name, i in numbers.items() if signature[name].startswith("*")},
    )
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(n) for n in re.findall(r"(?:REG|STACK):(\d+)", usage.stdout)[:2])
    words = constants.get("columns", 0) * constants.get("step", 0) / 4 / (32 * warps)
    loops = [f"{count / words:.1f}" for count in _loops(sass)] if words else []
    return {
        "kernel": kernel.__name__,
        "parts": constants.get("parts"),
        "registers": registers,
        "spilled": spilled,
        "shared": made.metadata.shared,
        "instructions": len(INSTRUCTION.findall(sass)),
        "integer": ", ".join(loops) or None,
    }


def _loops(sass: str) -> list[int]:
    """Of each innermost loop with products on matrix units, in order: how many integer instructions it has."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str]] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(found)
        instruction = INSTRUCTION.search(line)
        if instruction:
            found.append((int(instruction[1], 16), instruction[2], instruction[3]))
    bodies = []
    for end, (_, name, operands) in enumerate(found):
        jump = re.search(r"\.L_x_\d+", operands) if name == "BRA" else None
        if jump and labels.get(jump[0], end + 1) <= end:
            bodies.append((labels[jump[0]], end))
    counts = []
    for start, end in sorted(bodies):
        names = Counter(name for _, name, _ in found[start:end])
        has_inner = any(start < other and last < end for other, last in bodies)
        if not has_inner and any(name.startswith(("IMMA", "IGMMA", "UTCIMMA", "UTCQMMA")) for name in names):
            counts.append(sum(names[name] for name in ALU))
    return counts


if __name__ == "__main__":
    for number in sys.argv[1:]:
        print(f"sm_{number}\n\n{Table('', COLUMNS, compiled(int(number))).markdown()}")
