"""What a machine has fetched from stores: a folder of contents by their digests, and of deltas made of them.

    contents/SHA256      a file; the deltas that have it are links to it
    deltas/DIGEST/       a version: the delta's own folder, and beside it those of the deltas that it is made on
    deltas/DIGEST.lock   held by whoever uses it; its time is that of the last use
    coming/TOKEN/        contents that are being fetched
    coming/TOKEN.lock    held meanwhile, and as large as they will be
    lock                 held while what there is changes, for a moment

Several processes may use one cache.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deltacome.errors import DeltacomeError
from deltacome.files import disk_errors
from deltacome.format import digests
from deltacome.store.entry import Content, Entry
from deltacome.store.store import Store


def cache_folder() -> Path:
    """Where this machine's cache is, unless the environment says otherwise."""
    return Path(os.environ.get("DELTACOME_CACHE") or "~/.cache/deltacome").expanduser()


class Held:
    """A delta in the cache, which stays there until `close`. folder: the artifact's."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock = folder, lock

    def close(self) -> None:
        """Let go of it."""
        os.close(self._lock)


class Cache:
    """The cache in a folder, which is made. limit: bytes that it may take, None for any number.

    For a new delta those that nobody uses are removed, the longest unused first.

    Raises:
        DeltacomeError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder.absolute(), limit
        self._contents, self._deltas, self._coming = (self.folder / name for name in ("contents", "deltas", "coming"))
        with disk_errors(f"make the cache {folder}"):
            for each in (self._contents, self._deltas, self._coming):
                each.mkdir(parents=True, exist_ok=True)

    def hold(self, store: Store, entry: Entry, arrived: Callable[[int], None] = lambda _: None) -> Held:
        """A version, fetched unless it is here and whole.

        Args:
            arrived: told of the bytes of each part that comes.

        Raises:
            DeltacomeError: if the store does not give it, it is damaged, or there is no room for it.
        """
        with disk_errors(f"write the cache {self.folder}"):
            lock = _lock(self._deltas / f"{entry.digest}.lock", fcntl.LOCK_SH)
            try:
                os.utime(lock)
                place = self._deltas / entry.digest
                before = _number(place)
                if not all(_is_whole(path, content) for path, content in _files(place, entry)):
                    self._fetch(store, entry, place, before, arrived)
                return Held(place / _names(entry)[0], lock)
            except BaseException:
                os.close(lock)
                raise

    def _fetch(
        self, store: Store, entry: Entry, place: Path, damaged: int | None, arrived: Callable[[int], None]
    ) -> None:
        """Put a version in its place, where there is nothing, or the damaged folder of that number."""
        token = secrets.token_hex(8)
        coming, mark = self._coming / token, self._coming / f"{token}.lock"
        self._drop_damaged(entry)
        with self._changing():
            if _number(place) != damaged:  # another has been quicker
                return
            shutil.rmtree(place, ignore_errors=True)
            coming.mkdir()
            lock = _lock(mark, fcntl.LOCK_EX)
        try:
            with self._changing():
                for digest in entry.contents.keys() & {path.name for path in self._contents.iterdir()}:
                    os.link(self._contents / digest, coming / digest)  # so that it stays
                missing = [content for digest, content in entry.contents.items() if not (coming / digest).exists()]
                self._make_room(sum(content.size for content in missing))
                os.truncate(lock, sum(content.size for content in missing))
            for content in missing:
                store.fetch(content, coming / content.sha256, arrived)
            with self._changing():
                for content in missing:
                    if not (self._contents / content.sha256).exists():  # by another's fetching
                        os.link(coming / content.sha256, self._contents / content.sha256)
                tree = coming / "deltas"
                for path, content in _files(tree, entry):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.link(self._contents / content.sha256, path)
                if not place.exists():
                    tree.rename(place)
                os.truncate(lock, 0)
        finally:
            with self._changing():
                shutil.rmtree(coming, ignore_errors=True)
                mark.unlink()
            os.close(lock)

    def _drop_damaged(self, entry: Entry) -> None:
        """Remove what is here of a version's contents and not as it was fetched."""
        for digest, content in entry.contents.items():
            path = self._contents / digest
            number = _number(path)
            if number is not None and not _is_whole(path, content):
                with self._changing():
                    if _number(path) == number:
                        path.unlink()

    def _make_room(self, size: int) -> None:
        """Remove what is not used any more, until there is room for so many bytes; under the lock."""
        for mark in self._coming.glob("*.lock"):  # of processes that were killed
            if (lock := _try_lock(mark)) is not None:
                shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
                mark.unlink()
                os.close(lock)
        unused = sorted(self._deltas.glob("*.lock"), key=lambda mark: mark.stat().st_mtime)
        self._sweep()
        while self.limit is not None and self._bytes() + size > self.limit:
            if not unused or size > self.limit:
                raise DeltacomeError(
                    f"the cache {self.folder} has no room for {size:,} bytes: its limit is {self.limit:,}, and what "
                    "is in it is used; raise --store-cache"
                )
            mark = unused.pop(0)
            if (lock := _try_lock(mark)) is not None:
                shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
                mark.unlink()
                os.close(lock)
                self._sweep()

    def _sweep(self) -> None:
        """Remove contents that no delta has."""
        for path in self._contents.iterdir():
            if path.stat().st_nlink == 1:
                path.unlink()

    def _bytes(self) -> int:
        """Bytes of what is here and of what is coming."""
        return sum(path.stat().st_size for path in [*self._contents.iterdir(), *self._coming.glob("*.lock")])

    @contextmanager
    def _changing(self) -> Iterator[None]:
        lock = _lock(self.folder / "lock", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)


def _names(entry: Entry) -> list[str]:
    """The folders' names: the first one's is free to choose."""
    own = "delta"
    while own in entry.names:
        own += "_"
    return [own, *entry.names[1:]]


def _files(place: Path, entry: Entry) -> Iterator[tuple[Path, Content]]:
    for folder, files in zip(_names(entry), entry.folders, strict=True):
        for name, content in files.items():
            yield place / folder / name, content


def _is_whole(path: Path, content: Content) -> bool:
    try:
        return digests.sha256(path) == content.sha256
    except OSError:
        return False


def _number(path: Path) -> int | None:
    """What tells a file or a folder from another one of its name; None if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _lock(path: Path, kind: int) -> int:
    """A descriptor that holds the lock on a file, which is made if it is not there."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, kind)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:  # removed meanwhile
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """The same for a lock that nobody holds; None if somebody does, or the file is gone."""
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        os.close(lock)
        return None
