"""The folder that deltas come from while a server runs: what lies in it, and what of it may be read."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

from deltacome.errors import DeltacomeError
from deltacome.files import SIDECARS
from deltacome.format.manifest import MANIFEST

LONGEST_NAME = 96
PARTS = (MANIFEST, "*.safetensors", *SIDECARS)  # of an artifact, its card left out
Stamp = tuple[tuple[str, int, int, int], ...]


def is_name(name: str) -> bool:
    """Whether a model may be called so: what a line shows as it is, and what is neither a path nor a hidden folder."""
    is_plain = name.isprintable() and name == name.strip() and "/" not in name
    return is_plain and not name.startswith(".") and 0 < len(name) <= LONGEST_NAME


def resolve(root: Path | None, path: str) -> Path:
    """A folder that a request names, which must lie in the server's, links followed.

    Raises:
        DeltacomeError: if it does not.
    """
    if root is None:
        raise DeltacomeError("this server was started without --delta-dir, so that no delta can be loaded")
    try:
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root) and folder != root and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
        inside = False
    if not inside:
        raise DeltacomeError("there is no such folder in the server's --delta-dir")
    return folder


def find(root: Path) -> dict[str, tuple[Path, Stamp]]:
    """Where artifacts seem to be, and their stamps; one that may not be read has an empty stamp.

    Raises:
        OSError: if the folder itself cannot be read.
    """
    found: dict[str, tuple[Path, Stamp]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):  # being written
            continue
        folder = entry
        try:
            folder = entry.resolve()
            if folder.is_relative_to(root) and (folder / MANIFEST).is_file():
                found[entry.name] = folder, stamp(folder)
        except FileNotFoundError:  # gone since
            continue
        except (OSError, RuntimeError, DeltacomeError):  # forbidden; a loop of links; a pipe
            found[entry.name] = folder, ()
    return found


def stamp(folder: Path) -> Stamp:
    """What changes when any file of an artifact does: names, sizes, times, inodes.

    Raises:
        OSError: if the folder cannot be read.
        DeltacomeError: if one of them is something else than a file.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, part) for part in PARTS):
            status = path.stat()
            if not S_ISREG(status.st_mode):  # to open a pipe would wait for ever
                raise DeltacomeError(f"{path} is no file; fetch it again")
            found.append((path.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def stamp_if_there(folder: Path) -> Stamp:
    """As `stamp`, empty if the folder cannot be read."""
    try:
        return stamp(folder)
    except (OSError, DeltacomeError):
        return ()


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Make a sentence of whatever goes wrong with the files of a folder, which are anybody's.

    Raises:
        DeltacomeError: instead of every other exception.
    """
    try:
        yield
    except DeltacomeError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DeltacomeError(f"{folder} cannot be read ({type(error).__name__}: {reason}); fetch it again") from error
