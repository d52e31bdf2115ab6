"""The memory that a piece of work takes."""

import numpy as np

from deltacome.memory import peak_memory

BYTES = 2**28


def test_what_was_there_before_does_not_count() -> None:
    np.ones(BYTES, dtype=np.uint8)  # dropped at once
    with peak_memory() as peak:
        np.ones(BYTES // 8, dtype=np.uint8)
    assert peak.bytes < BYTES / 2
