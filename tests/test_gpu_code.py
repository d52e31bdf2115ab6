"""What the GPU kernels are compiled to, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

from deltacome.benchmark.random_model import PLAN
from deltacome.format.bits import planes

pytest.importorskip("triton", reason="Triton is not there")

# Integer instructions that a multiprocessor of an H100 has time for while a word of codes comes from memory: 64 of them
# a cycle, 132 multiprocessors, 1.7 GHz, against 3.35 TB/s.
BUDGET = 17
COMPILE = "import json; from deltacome.benchmark.compiled import compiled; print(json.dumps(compiled({})))"


@pytest.mark.parametrize(
    "architecture", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_integer_instructions_are_within_the_budget(architecture: int) -> None:
    """Of steps with up to four rows a tenant, at the bit-widths that a delta of 1/16 has; and none of it spills."""
    process = subprocess.run(
        [sys.executable, "-c", COMPILE.format(architecture)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {(row["kernel"], row["parts"]): row for row in json.loads(process.stdout)}
    words = dict.fromkeys((4, 2, 1), 0.0)
    for bits, share in PLAN.items():
        for _, width in planes(bits):
            words[width] += width * share
    for kernel in ("inner", "outer"):
        row = rows[kernel, 8]
        slots = [float(count) for count in row["integer"].split(", ")]
        mean = sum(n * w for n, w in zip(slots, words.values(), strict=True)) / sum(words.values())
        assert mean <= BUDGET, row
        assert row["spilled"] == 0, row
    assert {row["kernel"] for row in rows.values()} == {"prepare", "inner", "scale", "outer", "finish"}
