"""What Python hands to the compiled CPU kernel: tables of int64, and how threads share out the work in them.

A call has a table, each delta has one (`DELTA`, `TERM`, `PLANE`), and there is a row per delta of the batch
(`SEGMENT`); addresses are int64 too. A worker runs on every thread at once. The tasks of a step are numbered and cut
into runs, and a thread that takes a run goes through the numbers and does the tasks from `begin` to `end`.
"""

from numba import carray, njit

from deltacome.runtime.kernels.vectors import LANES, current_number, integers, next_number, yield_core

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
def delta_of(address):  # type: ignore[no-untyped-def]
    """The table of a delta and that of its terms."""
    delta = carray(integers(address), (DELTA,))
    return delta, carray(integers(address + 8 * DELTA), (delta[TERMS], TERM))


@njit(inline="always")
def plane_of(term, i):  # type: ignore[no-untyped-def]
    """The table of a term's plane."""
    return term[PLANES + 1 + PLANE * i : PLANES + 1 + PLANE * (i + 1)]


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
