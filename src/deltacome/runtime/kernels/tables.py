"""What Python hands to the compiled CPU kernel: tables of int64, and how threads share out the work in them.

A call has a table, each delta has one (`DELTA`, `GROUP`), and there is a row per delta of the batch (`SEGMENT`);
addresses are int64 too. A worker runs on every thread at once. The tasks of a step are numbered and cut into runs, and
a thread that takes a run goes through the numbers and does the tasks from `begin` to `end`.
"""

import hashlib
from pathlib import Path

from numba import carray, njit, types

from deltacome.runtime.kernels.vectors import current_number, integers, next_number, yield_core

# Numba keeps what it compiled beside a worker's file, and compiles again when that file changes, or the worker's
# closure: this is in it, so that a change in any of these files is seen.
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
STEPS = 5
# Places in the table of a call, in a segment, and in the table of a delta with its groups of codes.
X, Y, N, M, SEGMENTS, SEGMENT_COUNT, ROWS, ROW_COUNT, INVERSE = range(9)
INPUTS, INPUT_STRIDE, INPUT_BYTES, INPUT_STEP, INPUT_SCALES = range(9, 14)
SUMS, SUM_STRIDE, T_BYTES, T_STEP, T_SCALES, OUTPUTS, OUTPUT_STRIDE = range(14, 21)
RUNS, TASKS, ARRIVED = 21, 22, 27  # TASKS: one number for each of the steps
DONE, FLAGS = 28, 33  # for each step: runs that are done; for each step and run: who takes it finds 0
RUNS_PER_THREAD = 4
DELTA_OF, START, COUNT = range(3)
SEGMENT = 3
ROW_NUMBERS, FACTORED_ROWS, ROTATED_U, ROTATED_V, SIGNS_U, SIGNS_V, SIGN_WORDS, SIGN_SCALE = range(8)
RANK, SCALE, GROUPS = range(8, 11)
DELTA = 11
# FIRST, PLACE: where the sums and the bytes of a group's planes begin. Of a run of planes: `packed.Group.runs`.
WIDTH, PLANE_COUNT, RUN_COUNT, PLANE_RUNS, U, V, FIRST, PLACE = range(8)
GROUP = 8
# Of a delta what the tables of calls are made of: ADDRESS of its table, inputs, planes, outputs, BYTES for a number of
# each plane, and tasks: blocks of columns of the two products, and of a row's outputs.
ADDRESS, DELTA_INPUTS, DELTA_PLANES, DELTA_OUTPUTS, DELTA_BYTES, INNER_TASKS, OUTER_TASKS, OUTPUT_TASKS = range(8)
NUMBERS = 8
MOST_GROUPS = 4
COMPONENT, RUN_LENGTH, FIRST_BIT = range(3)
SCRATCH = (SUMS, OUTPUTS, T_SCALES, T_BYTES)  # addresses in memory that a thread keeps


_INTS, _TABLES = types.int64[::1], types.int64[:, ::1]
_NUMBERS, _SEGMENTS = types.Array(types.int64, 3, "A"), types.int64[:, :, ::1]


@njit(types.void(_NUMBERS, _INTS, types.int64, _SEGMENTS, _TABLES, _INTS), cache=True)
def fill_calls(numbers, counts, rows, segments, data, floats):  # type: ignore[no-untyped-def]
    """Fill the tables of calls for some matrices, which have the same rows.

    numbers: of each delta in each matrix, (deltas, matrices, NUMBERS). counts: rows of each delta. rows: the address of
    their numbers. segments: (matrices, deltas, SEGMENT). data: (matrices, FLAGS), zeros; `SCRATCH` is counted from 0.
    floats: of scratch memory, (matrices,).
    """
    for i in range(data.shape[0]):
        call, count = data[i], 0
        for s in range(counts.size):
            own = numbers[s, i]
            segments[i, s, DELTA_OF], segments[i, s, START], segments[i, s, COUNT] = own[ADDRESS], count, counts[s]
            count += counts[s]
            call[N] = max(call[N], own[DELTA_INPUTS])
            call[SUM_STRIDE] = max(call[SUM_STRIDE], own[DELTA_PLANES])
            call[OUTPUT_STRIDE] = max(call[OUTPUT_STRIDE], own[DELTA_OUTPUTS])
            call[T_STEP] = max(call[T_STEP], own[DELTA_BYTES])
            call[TASKS + 1] += own[INNER_TASKS]
            call[TASKS + 3] += own[OUTER_TASKS]
            call[TASKS + 4] += own[OUTPUT_TASKS] * counts[s]
        call[ROWS], call[ROW_COUNT], call[TASKS], call[TASKS + 2] = rows, count, count, count
        call[SEGMENTS] = segments.ctypes.data + 8 * SEGMENT * counts.size * i
        call[SEGMENT_COUNT] = counts.size
        floats[i] = 0
        lengths = (call[SUM_STRIDE], call[OUTPUT_STRIDE], 4 * MOST_GROUPS, call[T_STEP] // 2)
        for j in range(4):
            call[SCRATCH[j]] = 4 * floats[i]
            floats[i] += -(-lengths[j] * count // 16) * 16


@njit(inline="always")
def delta_of(address):  # type: ignore[no-untyped-def]
    """The table of a delta and that of its groups."""
    delta = carray(integers(address), (DELTA,))
    return delta, carray(integers(address + 8 * DELTA), (delta[GROUPS], GROUP))


@njit(inline="always")
def runs_of(group):  # type: ignore[no-untyped-def]
    """The table of a group's runs of planes."""
    return carray(integers(group[PLANE_RUNS]), (group[RUN_COUNT], 3))


@njit(inline="always")
def tasks_of(data, step, run):  # type: ignore[no-untyped-def]
    """The first task of a run, and that after its last."""
    return data[TASKS + step] * run // data[RUNS], data[TASKS + step] * (run + 1) // data[RUNS]


@njit(inline="always")
def take(data, step, run):  # type: ignore[no-untyped-def]
    """Whether this thread is the first that asks for the run."""
    return next_number(data.ctypes.data + 8 * (FLAGS + step * data[RUNS] + run)) == 0


@njit(inline="always")
def finish(data, step):  # type: ignore[no-untyped-def]
    """Count a run as done."""
    next_number(data.ctypes.data + 8 * (DONE + step))


@njit(error_model="numpy")
def wait(data, step):  # type: ignore[no-untyped-def]
    """Wait until all runs of a step are done."""
    counter = data.ctypes.data + 8 * (DONE + step)
    spins = 0
    while current_number(counter) < data[RUNS]:
        spins += 1
        if spins > 2000:  # more threads than cores, perhaps: let the others on
            yield_core()
