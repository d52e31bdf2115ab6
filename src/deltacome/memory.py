"""Peak memory of a piece of work, and memory that has run out."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

if sys.platform != "win32":
    import resource

INTERVAL = 0.02  # seconds between two looks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU too; torch has no type of its own for the CPU's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


class Peak:
    """Bytes of memory above those at the start, at the worst moment so far."""

    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch this process's memory while the block runs.

    Two measures, of which the larger counts. The kernel's own peak misses nothing, mapped files included, but is that
    of the whole process: it counts if it has grown. Looking every few milliseconds at the memory that no file backs
    misses short peaks.
    """
    process, peak, stop = psutil.Process(), Peak(), threading.Event()

    def private() -> int:
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))

    resident, start, largest_before = process.memory_info().rss, private(), _largest()

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
        if _largest() > largest_before:
            peak.bytes = max(peak.bytes, _largest() - resident)


def _largest() -> int:
    """The most memory that the process ever had, in bytes; 0 on Windows, which has no such count."""
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
