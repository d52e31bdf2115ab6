"""The tenants of a server: which there are, which are in memory, and who uses them."""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import check_base
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.lineage import ParentError, locate_artifact
from deltacome.runtime.kernels.cpu import compute_alone
from deltacome.runtime.tenant import Tenant, check_config
from deltacome.serve.folder import LONGEST_NAME, Stamp, find, is_name, readable, stamp, stamp_if_there
from deltacome.serve.languages import Language, Languages
from deltacome.serve.metrics import Metrics
from deltacome.store.entry import Entry
from deltacome.store.fetching import Fetching

ROOM_SECONDS = 30.0  # that `load` waits for room
log = logging.getLogger("deltacome.serve")


class UnknownModelError(DeltacomeError):
    """A name that no model has."""


class NoRoomError(DeltacomeError):
    """A delta that the memory limit has no room for."""


class BusyNameError(DeltacomeError):
    """A name whose delta is just being loaded."""


@dataclass(eq=False)
class Loaded:
    """A model in memory. tenant: None for the base. vocabulary: tokens that it knows. uses: requests that use it."""

    tenant: Tenant | None
    language: Language
    vocabulary: int
    uses: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def bytes(self) -> int:
        return 0 if self.tenant is None else self.tenant.bytes


@dataclass(eq=False)
class RegisteredDelta:
    """A delta that can be asked for. size: bytes of its artifact, parents' included. stamp: of its own folder, stamps:
    of its parents' by theirs. is_watched: it came from the watched folder. entry: of a delta of the store, which has no
    folder.

    arriving: what loads it. wanted: how many wait for that.
    """

    folder: Path | None
    size: int
    full_bytes: int
    stamp: Stamp
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    is_watched: bool = False
    entry: Entry | None = None
    loaded: Loaded | None = None
    arriving: asyncio.Task[None] | None = None
    wanted: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def is_current(self, found: Stamp) -> bool:
        """Whether its files, of which those of its own folder have that stamp now, are as they were."""
        return found == self.stamp and all(own == stamp_if_there(folder) for folder, own in self.stamps.items())


class Registry:
    """The deltas over a model from `deltacome.load`; to be used from one event loop, which it never holds up.

    name: the base's. folder: where deltas may be loaded from while it runs. memory_limit: bytes that deltas may take.
    fetching: the store's deltas.
    """

    def __init__(
        self,
        model: Any,
        base: Checkpoint,
        name: str,
        metrics: Metrics,
        *,
        folder: Path | None = None,
        memory_limit: int | None = None,
        chat_template: str | None = None,
        fetching: Fetching | None = None,
        tool_format: str | None = None,
    ) -> None:
        self.model, self.base_checkpoint, self.name, self.metrics = model, base, name, metrics
        self.folder = None if folder is None else folder.resolve()
        if self.folder is not None:
            if not self.folder.is_dir():
                raise DeltacomeError(f"there is no folder {folder}")
            base.fingerprint()  # now, rather than when the first delta comes
        self.memory_limit, self.fetching = memory_limit, fetching
        self.pinned: set[str] = set()  # names whose deltas are never dropped
        self.languages = Languages(base, chat_template, tool_format)
        self.base, self.created = self._loaded(None), int(time.time())
        self.deltas: dict[str, RegisteredDelta] = {}
        self.in_memory: set[Loaded] = set()  # replaced ones that are still used included
        self._coming = 0  # bytes of what is being read
        self._freed = asyncio.Event()  # set, and another put in its place, when there may be more room
        self._claimed: set[str] = set()  # names whose delta `load` is loading
        self._refused: dict[str, tuple[Stamp | None, str]] = {}  # what the watched folder has and why not
        self._damaged: dict[str, str] = {}  # the same of the store
        self._reader = ThreadPoolExecutor(1, "reader", compute_alone)
        metrics.add(name)
        metrics.memory.set_function(self._bytes_in_memory)
        metrics.memory_limit.set(memory_limit or 0)

    # Which deltas there are.

    def add(self, name: str, folder: Path) -> None:
        """Make a delta known, before the server starts; it is loaded when it is first asked for.

        Raises:
            DeltacomeError: if the name is taken or odd, or the folder holds no artifact that this base can serve.
        """
        self._check_name(name, replace=False)
        self._register(name, self._open(folder))

    async def load(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Make a delta known and load it now.

        Raises:
            DeltacomeError: as `add`, or if its files are broken or do not fit; then nothing has changed.
            BusyNameError: if another of that name is being loaded.
            NoRoomError: if there is no room for it, or none comes free in time.
        """
        self._check_name(name, replace)
        with self._claim(name):
            delta = await asyncio.to_thread(self._open, folder)
            delta.wanted = 1
            await self._load(name, delta, ROOM_SECONDS)
            delta.wanted = 0
            self._register(name, delta)

    def _check_name(self, name: str, replace: bool) -> None:
        if not is_name(name):
            raise DeltacomeError(f"{name!r} is no name for a model: up to {LONGEST_NAME} characters, no / among them")
        if name == self.name:
            raise DeltacomeError(f"{name!r} is the base's name; take another")
        self._check_unclaimed(name)
        if name in self.deltas and not replace:
            raise DeltacomeError(f"there is a model {name!r} already; unload it, or load in place")

    def _check_unclaimed(self, name: str) -> None:
        if name in self._claimed:
            raise BusyNameError(f"{name!r} is just being loaded; wait for that, and try again")

    @contextmanager
    def _claim(self, name: str) -> Iterator[None]:
        self._claimed.add(name)
        try:
            yield
        finally:
            self._claimed.discard(name)

    def _open(self, folder: Path, is_watched: bool = False) -> RegisteredDelta:
        """Look at an artifact, on any thread."""
        folder = locate_artifact(folder).resolve()
        with readable(folder):
            found = stamp(folder)
            artifact = Artifact(folder)
            check_base(artifact, self.base_checkpoint)
            check_config(artifact, self.base_checkpoint)
            stamps = {parent.folder: stamp_if_there(parent.folder) for parent in artifact.chain[1:]}
            return RegisteredDelta(folder, artifact.chain_bytes, artifact.finetuned_bytes, found, stamps, is_watched)

    def _register(self, name: str, delta: RegisteredDelta) -> None:
        known = self.deltas.get(name)
        self.deltas[name] = delta
        if known is not None and known.loaded is not None:
            self._drop(known.loaded)
        self.metrics.add(name)
        self.metrics.delta_bytes.labels(name).set(0 if delta.loaded is None else delta.loaded.bytes)

    def remove(self, name: str) -> None:
        """Forget a delta; requests that run keep it until they end.

        Raises:
            UnknownModelError: if there is none of that name.
            BusyNameError: if one of that name is being loaded.
        """
        self._check_unclaimed(name)
        delta = self.deltas.pop(name, None)
        if delta is None:
            raise UnknownModelError(f"there is no delta {name!r}")
        if delta.loaded is not None:
            self._drop(delta.loaded)
        self.metrics.remove(name)

    def scan(self) -> None:
        """Bring what is known into line with the watched folder: each subfolder with an artifact is a tenant.

        Raises:
            OSError: if the folder cannot be read.
        """
        known = dict(self.deltas)
        self._take(known, *self._look(known))

    async def rescan(self) -> None:
        """`scan` while the server runs.

        Raises:
            OSError: if the folder cannot be read.
        """
        known = dict(self.deltas)
        self._take(known, *await asyncio.to_thread(self._look, known))

    def _look(self, known: dict[str, RegisteredDelta]) -> tuple[dict[str, Path], dict[str, RegisteredDelta]]:
        """Where the watched folder has artifacts, and those that are new; on any thread, one look at a time."""
        present = {} if self.folder is None else find(self.folder)
        self._refused = {name: refused for name, refused in self._refused.items() if name in present}
        new = {}
        for name, (folder, found) in present.items():
            delta = known.get(name)
            stamp_before, reason = self._refused.get(name, (None, None))
            if found == stamp_before or (delta is not None and (not delta.is_watched or delta.is_current(found))):
                continue
            try:
                if not is_name(name) or name == self.name:
                    raise DeltacomeError(f"{name!r} is no name for a delta here; rename its folder")
                new[name] = self._open(folder, is_watched=True)
                self._refused.pop(name, None)
            except DeltacomeError as error:
                # A parent may come, or become whole, while nothing changes in its child's folder: look at that again.
                self._refused[name] = None if isinstance(error, ParentError) else found, str(error)
                if reason != str(error):
                    log.warning("delta refused", extra={"fields": {"tenant": name, "reason": str(error)}})
        return {name: folder for name, (folder, _) in present.items()}, new

    def _take(
        self, known: dict[str, RegisteredDelta], present: dict[str, Path], new: dict[str, RegisteredDelta]
    ) -> None:
        """Take over what a look has found, but for names that have changed hands meanwhile."""
        for name in known.keys() | new.keys():
            delta = known.get(name)
            if self.deltas.get(name) is not delta or name in self._claimed:
                continue
            if name in new:
                self._register(name, new[name])
                log.info("delta found", extra={"fields": {"tenant": name}})
            elif delta is not None and delta.is_watched and present.get(name) != delta.folder:
                self.remove(name)
                log.info("delta gone", extra={"fields": {"tenant": name}})

    async def look_into_store(self) -> None:
        """Bring what is known into line with the store: the newest version of each name is a tenant, and so are those
        of tags and versions that have been asked for.

        Raises:
            FetchError: if it does not answer; all stays as it was.
        """
        assert self.fetching is not None
        await self.fetching.look()
        for name, reason in self.fetching.damaged.items():
            if self._damaged.get(name) != reason:
                log.warning("delta refused", extra={"fields": {"tenant": name, "reason": reason}})
        self._damaged = dict(self.fetching.damaged)
        newest = self.fetching.newest()
        for name, delta in list(self.deltas.items()):
            version = self.fetching.version(name)
            is_gone = version is None or (name not in newest and ":" not in name)
            is_other = delta.entry is not None and delta.entry.version != version and name not in newest
            if delta.entry is not None and name not in self._claimed and (is_gone or is_other):
                self.remove(name)
                log.info("delta gone", extra={"fields": {"tenant": name}})
        for name, entry in newest.items():
            self._take_from_store(name, entry)

    def _take_from_store(self, name: str, entry: Entry) -> None:
        """Make a delta of the store known, unless another has its name."""
        known = self.deltas.get(name)
        if name == self.name or name in self._claimed or (known is not None and known.entry in (None, entry)):
            return
        self._register(name, RegisteredDelta(None, entry.size, entry.full_bytes, (), entry=entry))
        log.info("delta found", extra={"fields": {"tenant": name, "version": entry.version}})
        if name in self.pinned:
            self._begin(name, self.deltas[name])

    async def pin(self, names: Iterable[str]) -> None:
        """Load deltas that are never dropped, before the server starts.

        Raises:
            DeltacomeError: if there is none of a name, it is broken, or there is no room for all of them.
        """
        for name in names:
            self.release(await self.lease(name))
            self.pinned.add(name)

    # Which of them are in memory.

    async def lease(self, name: str) -> Loaded:
        """The model of that name, loaded from disk if need be; give it back by `release`.

        Raises:
            UnknownModelError: if there is none.
            NoRoomError: if the memory limit is less than it takes.
            DeltacomeError: if its files are broken.
        """
        loaded = await self._load_on_demand(name)
        loaded.uses += 1
        loaded.last_used = time.monotonic()
        return loaded

    def release(self, loaded: Loaded) -> None:
        """Give back what `lease` returned."""
        loaded.uses -= 1
        if loaded is not self.base and all(delta.loaded is not loaded for delta in self.deltas.values()):
            self._drop(loaded)
        self._tell_waiting()

    async def _load_on_demand(self, name: str) -> Loaded:
        if name == self.name:
            return self.base
        while True:
            delta = self.deltas.get(name)
            if delta is None:
                self._take_from_store(name, await self._find_in_store(name))
                continue
            if delta.loaded is not None:
                return delta.loaded
            delta.wanted += 1
            try:
                await asyncio.shield(self._begin(name, delta))
            finally:
                delta.wanted -= 1
                self._tell_waiting()

    async def _find_in_store(self, name: str) -> Entry:
        """A version that is asked for and not known yet.

        Raises:
            UnknownModelError: if there is none on this base.
            FetchError: if the store does not say.
        """
        entry = None
        if self.fetching is not None and name not in self._claimed:
            entry = await self.fetching.find(name)
        if entry is None:
            raise UnknownModelError(f"there is no model {name!r}")
        if entry.fingerprint != self.base_checkpoint.fingerprint():
            raise UnknownModelError(f"{name} in the store is a delta on {entry.base}, which is another base")
        return entry

    def _begin(self, name: str, delta: RegisteredDelta) -> asyncio.Task[None]:
        """What loads a delta, begun unless it is under way."""
        if delta.arriving is None:
            delta.arriving = asyncio.create_task(self._bring(name, delta))
            delta.arriving.add_done_callback(lambda task: task.cancelled() or task.exception())  # if all have gone
        return delta.arriving

    async def _bring(self, name: str, delta: RegisteredDelta) -> None:
        """Load a known delta, for however many requests wait for it, and whoever of them goes."""
        try:
            await self._load(name, delta, None)
            if self.deltas.get(name) is delta:
                self.metrics.delta_bytes.labels(name).set(0 if delta.loaded is None else delta.loaded.bytes)
            elif delta.loaded is not None:  # removed or replaced meanwhile
                self._drop(delta.loaded)
        finally:
            delta.arriving = None

    async def _load(self, name: str, delta: RegisteredDelta, seconds: float | None) -> None:
        """Fetch a delta if need be, read it from disk, and keep it. seconds: to wait for room at most."""
        if delta.folder is not None:
            await self._load_from(delta.folder, name, delta, seconds)
            return
        assert self.fetching is not None and delta.entry is not None
        held = await self.fetching.hold(delta.entry)  # before there is room for it: that may take its time
        try:
            await self._load_from(held.folder, name, delta, seconds)
        finally:
            held.close()

    async def _load_from(self, folder: Path, name: str, delta: RegisteredDelta, seconds: float | None) -> None:
        size = int(1.1 * delta.size)  # a bound on what it takes in memory
        try:
            async with asyncio.timeout(seconds):
                await self._make_room(name, delta, size)
        except TimeoutError as error:
            raise NoRoomError(
                f"no room for {name} came free in {seconds:g} s: requests use all that is in memory; "
                "try again, or raise --memory-limit"
            ) from error
        self._coming += size
        try:
            read = asyncio.get_running_loop().run_in_executor(self._reader, self._read, name, folder)
            self._keep_in_memory(name, delta, await read)
        finally:
            self._coming -= size
            self._tell_waiting()

    def preload(self, name: str) -> None:
        """Load a delta before the server starts, if the memory limit has room for it.

        Raises:
            DeltacomeError: if its files are broken; then it is forgotten.
        """
        delta = self.deltas[name]
        assert delta.folder is not None
        try:
            loaded = self._read(name, delta.folder)
        except DeltacomeError:
            self.remove(name)
            raise
        if self.memory_limit is None or self._bytes_in_memory() + loaded.bytes <= self.memory_limit:
            self._keep_in_memory(name, delta, loaded)
            self.metrics.delta_bytes.labels(name).set(loaded.bytes)

    def _keep_in_memory(self, name: str, delta: RegisteredDelta, loaded: Loaded) -> None:
        delta.loaded = loaded
        self.in_memory.add(loaded)
        self.metrics.loads.labels(self.metrics.label(name)).inc()
        log.info("delta loaded", extra={"fields": {"tenant": name, "bytes": loaded.bytes}})

    def _read(self, name: str, folder: Path) -> Loaded:
        with readable(folder):
            return self._loaded(self.model.tenants.read(name, folder))

    def _loaded(self, tenant: Tenant | None) -> Loaded:
        return Loaded(tenant, self.languages.of(tenant), self._vocabulary(tenant))

    def _vocabulary(self, tenant: Tenant | None) -> int:
        """Tokens that a model knows."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        change = None if tenant is None else tenant.changes.get(name)
        count: int = embedding.weight.shape[0]
        return count if change is None else change.vocabulary(count)

    def _bytes_in_memory(self) -> int:
        return sum(loaded.bytes for loaded in self.in_memory)

    async def _make_room(self, name: str, delta: RegisteredDelta, size: int) -> None:
        """Drop deltas that nobody uses, the longest unused first, until there is room; wait for one if need be."""
        if self.memory_limit is None:
            return
        pinned = [own.loaded.bytes for other in self.pinned if (own := self.deltas.get(other)) and own.loaded]
        if size > self.memory_limit - sum(pinned):
            beside = f", of which pinned deltas take {sum(pinned):,}" if pinned else ""
            raise NoRoomError(
                f"{name} takes {size:,} bytes and the memory limit is {self.memory_limit:,}{beside}; raise it"
            )
        while self._bytes_in_memory() + self._coming + size > self.memory_limit:
            if not self._evict():
                await self._freed.wait()
                if not delta.wanted:
                    raise NoRoomError(f"nobody waits for {name} any more")

    def _evict(self) -> bool:
        """Drop the longest unused delta; whether there was one that nobody uses."""
        idle = [
            (delta.loaded.last_used, name)
            for name, delta in self.deltas.items()
            if delta.loaded is not None and not delta.loaded.uses and not delta.wanted and name not in self.pinned
        ]
        if not idle:
            return False
        _, name = min(idle)
        loaded, self.deltas[name].loaded = self.deltas[name].loaded, None
        assert loaded is not None
        self._drop(loaded)
        self.metrics.delta_bytes.labels(name).set(0)
        self.metrics.evictions.labels(name).inc()
        log.info("delta evicted", extra={"fields": {"tenant": name}})
        return True

    def _drop(self, loaded: Loaded) -> None:
        """Let go of a model that no name has any more, unless requests use it: the last of them lets it go."""
        if not loaded.uses:
            self.in_memory.discard(loaded)
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        """Who waits for room looks again."""
        self._freed.set()
        self._freed = asyncio.Event()
