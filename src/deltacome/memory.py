"""Peak memory of a piece of work, and whether it was too much."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

if sys.platform != "win32":
    import resource

INTERVAL = 0.02  # seconds between two looks


class Peak:
    """Bytes of memory above those at the start, at the worst moment so far."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch this process's memory while the block runs.

    Two measures, of which the larger counts. The kernel's own peak misses nothing, mapped files included, but starts
    from all that was resident before, part of which may have been dropped since. Looking every few milliseconds at the
    memory that no file backs misses short peaks.
    """
    process, peak, stop = psutil.Process(), Peak(), threading.Event()

    def private() -> int:
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))

    resident, start = process.memory_info().rss, private()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            peak.bytes = max(peak.bytes, private() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        if sys.platform != "win32":  # which has no such count
            largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            peak.bytes = max(peak.bytes, largest - resident)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that this machine, or its GPU, has not enough memory; the CPU's from torch is a
    RuntimeError among others."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
