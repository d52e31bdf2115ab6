"""Digests that a process remembers, so that a server does not read a delta's files again each time it loads them."""

import time
from pathlib import Path

from deltacome import files

# A file written twice within a tick of its file system's clock looks the same twice: one as young as that is not
# remembered.
YOUNG_NS = 2 * 10**9

_known: dict[tuple[int, ...], str] = {}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, remembered by its device, inode, size, and times of writing and change."""
    key = _key(path)
    if key in _known:
        return _known[key]
    found = files.sha256(path)
    if key == _key(path) and time.time_ns() - max(key[-2:]) > YOUNG_NS:
        _known[key] = found
    return found


def _key(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
