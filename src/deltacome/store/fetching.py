"""A store for a server: what it has, and its deltas fetched beside what runs. One that hangs holds up nobody else."""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TypeVar

from deltacome.errors import DeltacomeError
from deltacome.store.cache import Cache, Held
from deltacome.store.entry import Entry
from deltacome.store.store import Listing, Store, Version

SILENCE_SECONDS = 60.0  # without a byte, after which nobody waits for a store any longer
Arrived = Callable[[int], None]
Result = TypeVar("Result")


class FetchError(DeltacomeError):
    """A delta of a store that cannot be had: the store does not answer, or what it has is damaged."""


class Fetching:
    """The deltas of a store, by way of a cache; for one event loop at a time.

    fingerprint: of the base whose deltas `newest` has. damaged: names whose newest version cannot be used, and why.
    """

    def __init__(self, store: Store, cache: Cache, fingerprint: str | None = None) -> None:
        self.store, self.cache, self.fingerprint = store, cache, fingerprint
        self.damaged: dict[str, str] = {}
        self._listing = Listing({}, {})
        self._entries: dict[Version, Entry] = {}
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._busy: set[Hashable] = set()  # what threads are at, those included that nobody waits for any longer

    async def look(self) -> None:
        """See what there is.

        Raises:
            FetchError: if the store does not answer; then all stays as it was last seen.
        """

        def work(arrived: Arrived) -> tuple[Listing, list[tuple[Version, Entry | DeltacomeError]]]:
            listing = self.store.look()
            arrived(0)
            new = [pushes[0] for pushes in listing.pushes.values() if pushes[0] not in self._entries]
            return listing, list(zip(new, self.store.entries(new), strict=True))

        self._listing, found = await self._patiently("look", work)
        known = {version for pushes in self._listing.pushes.values() for version in pushes}
        entries = {version: entry for version, entry in self._entries.items() if version in known}
        self._entries = entries | {version: entry for version, entry in found if isinstance(entry, Entry)}
        self.damaged = {version.name: str(error) for version, error in found if not isinstance(error, Entry)}

    def newest(self) -> dict[str, Entry]:
        """Of each name the newest version that was seen, if it is on this base."""
        newest = {name: self._entries.get(pushes[0]) for name, pushes in self._listing.pushes.items()}
        return {name: entry for name, entry in newest.items() if entry and entry.fingerprint == self.fingerprint}

    def version(self, reference: str) -> str | None:
        """The version that NAME, NAME:VERSION or NAME:TAG meant when the store was seen last; None if none."""
        with suppress(DeltacomeError):
            return self._listing.find(reference).version
        return None

    async def find(self, reference: str) -> Entry | None:
        """The version that NAME, NAME:VERSION or NAME:TAG means; None if there is none.

        Raises:
            FetchError: if it is damaged, or the store does not answer.
        """
        try:
            version = self._listing.find(reference)
        except DeltacomeError:
            return None
        if version not in self._entries:
            self._entries[version] = await self._patiently(version, lambda _: self.store.entry(version))
        return self._entries[version]

    async def hold(self, entry: Entry) -> Held:
        """A version in the cache, fetched if need be; to be closed when it has been read.

        Raises:
            FetchError: as `Cache.hold`, or if the store does not answer.
        """
        return await self._patiently(entry.digest, lambda arrived: self.cache.hold(self.store, entry, arrived))

    async def _patiently(self, what: Hashable, work: Callable[[Arrived], Result]) -> Result:
        """Have a thread of its own do something, one for the same thing at a time, and wait as long as bytes arrive.

        A thread that nobody waits for any longer goes on; until it ends, the same is refused at once.
        """
        async with self._locks.setdefault(what, asyncio.Lock()):
            if what in self._busy:
                raise FetchError(f"the store {self.store.address} does not answer")
            return await self._wait_for(what, work)

    async def _wait_for(self, what: Hashable, work: Callable[[Arrived], Result]) -> Result:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        last = time.monotonic()

        def arrived(_: int) -> None:
            nonlocal last
            last = time.monotonic()

        def settle(result: Result | None, error: BaseException | None) -> None:
            self._busy.discard(what)
            if future.done():
                if isinstance(result, Held):
                    result.close()
            elif error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = work(arrived)
            except DeltacomeError as refused:
                error = FetchError(str(refused))
            except BaseException as broken:
                error = FetchError(f"the store {self.store.address} cannot be read ({type(broken).__name__}: {broken})")
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, result, error)

        self._busy.add(what)
        threading.Thread(target=run, name="store", daemon=True).start()
        try:
            while not future.done():
                left = last + SILENCE_SECONDS - time.monotonic()
                if left <= 0:
                    raise FetchError(
                        f"the store {self.store.address} has not answered for {SILENCE_SECONDS:g} s; the others go on"
                    )
                await asyncio.wait({future}, timeout=left)
            return future.result()
        finally:
            future.cancel()
