"""The tenants of a server: which there are, which are in memory, and who uses them."""

import asyncio
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import check_base
from deltacome.data import Encoder
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact, locate_artifact
from deltacome.format.manifest import MANIFEST
from deltacome.runtime.conversation import load_language
from deltacome.runtime.kernels.cpu import compute_alone
from deltacome.runtime.tenant import Tenant, check_config
from deltacome.serve.metrics import Metrics

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
log = logging.getLogger("deltacome.serve")


class UnknownModelError(DeltacomeError):
    """A name that no model has."""


class NoRoomError(DeltacomeError):
    """A delta that the memory limit has no room for."""


@dataclass(eq=False)
class Language:
    """What turns text into tokens and back: it takes more memory than many a delta, so models share it where they can.

    ends: tokens that end an answer.
    """

    tokenizer: Any
    encoder: Encoder
    ends: set[int]


@dataclass(eq=False)
class Loaded:
    """A model in memory. tenant: None for the base. vocabulary: tokens that it knows. uses: requests that use it."""

    tenant: Tenant | None
    language: Language
    vocabulary: int
    uses: int = 0
    last_used: float = 0.0

    @property
    def bytes(self) -> int:
        return 0 if self.tenant is None else self.tenant.bytes


@dataclass(eq=False)
class RegisteredDelta:
    """A delta that can be asked for. size: bytes of its artifact. is_watched: it came from the watched folder."""

    folder: Path
    size: int
    full_bytes: int
    stamp: tuple[int, int]
    is_watched: bool = False
    loaded: Loaded | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class Registry:
    """The deltas over a model from `deltacome.load`; to be used from one event loop.

    name: the base's. folder: where deltas may be loaded from while it runs. memory_limit: bytes that deltas may take.
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
    ) -> None:
        self.model, self.base_checkpoint, self.name, self.metrics = model, base, name, metrics
        self.folder = None if folder is None else folder.resolve()
        if self.folder is not None and not self.folder.is_dir():
            raise DeltacomeError(f"there is no folder {folder}")
        self.memory_limit, self.chat_template = memory_limit, chat_template
        self._languages: WeakValueDictionary[tuple[frozenset[tuple[str, str]], frozenset[int]], Language]
        self._languages = WeakValueDictionary()  # by files, and by end tokens, which config.json may name
        self.base, self.created = self._loaded(None), int(time.time())
        self.deltas: dict[str, RegisteredDelta] = {}
        self.in_memory: set[Loaded] = set()  # replaced ones that are still used included
        self.loading = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "reader", compute_alone)
        self.released = asyncio.Condition()
        self._refused: dict[Path, tuple[int, int]] = {}

    # Which deltas there are.

    def add(self, name: str, folder: Path, *, is_watched: bool = False, replace: bool = False) -> None:
        """Make a delta known; it is loaded when it is first asked for.

        Raises:
            DeltacomeError: if the name is taken or odd, or the folder holds no artifact that this base can serve.
        """
        self._register(name, self._open(name, folder, is_watched, replace))

    async def load(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Make a delta known and load it now.

        Raises:
            DeltacomeError: as `add`, or if its files are broken or do not fit; then nothing has changed.
        """
        delta = self._open(name, folder, False, replace)
        async with self.loading:
            await self._load_from_disk(name, delta)
            self._register(name, delta)

    def _open(self, name: str, folder: Path, is_watched: bool, replace: bool) -> RegisteredDelta:
        if not NAME.fullmatch(name):
            raise DeltacomeError(f"{name!r} is no name for a model: letters, digits and ._- only, up to 96")
        if name == self.name:
            raise DeltacomeError(f"{name!r} is the base's name; take another")
        if name in self.deltas and not replace:
            raise DeltacomeError(f"there is a model {name!r} already; unload it, or load in place")
        folder = locate_artifact(folder).resolve()
        stamp = _stamp(folder)
        artifact = Artifact(folder)
        check_base(artifact, self.base_checkpoint)
        check_config(artifact, self.base_checkpoint)
        return RegisteredDelta(folder, artifact.bytes, artifact.finetuned_bytes, stamp, is_watched)

    def _register(self, name: str, delta: RegisteredDelta) -> None:
        self.remove(name, missing_ok=True)
        self.deltas[name] = delta
        self.metrics.delta_bytes.labels(name).set(0 if delta.loaded is None else delta.loaded.bytes)

    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Forget a delta; requests that run keep it until they end.

        Raises:
            UnknownModelError: if there is none of that name.
        """
        delta = self.deltas.pop(name, None)
        if delta is None:
            if missing_ok:
                return
            raise UnknownModelError(f"there is no delta {name!r}")
        if delta.loaded is not None:
            self._drop(delta.loaded)
        self.metrics.delta_bytes.remove(name)

    def resolve(self, path: str) -> Path:
        """A folder that a request names, which must lie in the configured one, links followed.

        Raises:
            DeltacomeError: if it does not.
        """
        if self.folder is None:
            raise DeltacomeError("this server was started without --delta-dir, so that no delta can be loaded")
        try:
            folder = (self.folder / path).resolve()
            inside = folder.is_relative_to(self.folder) and folder != self.folder and folder.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
            inside = False
        if not inside:
            raise DeltacomeError("there is no such folder in the server's --delta-dir")
        return folder

    def scan(self) -> None:
        """Bring what is known into line with the watched folder: each subfolder with an artifact is a tenant."""
        if self.folder is None:
            return
        present = {}
        for folder in sorted(self.folder.iterdir()):
            if NAME.fullmatch(folder.name) and (folder / MANIFEST).is_file():
                inside = folder.resolve()
                if inside.is_relative_to(self.folder):
                    present[folder.name] = inside
        for name, delta in list(self.deltas.items()):
            if delta.is_watched and present.get(name) != delta.folder:
                self.remove(name)
                log.info("delta gone", extra={"fields": {"tenant": name}})
        for name, folder in present.items():
            known = self.deltas.get(name)
            try:
                stamp = _stamp(folder)
                if (known is not None and (not known.is_watched or known.stamp == stamp)) or (
                    self._refused.get(folder) == stamp
                ):
                    continue
                self._refused[folder] = stamp
                self.add(name, folder, is_watched=True, replace=True)
                del self._refused[folder]
                log.info("delta found", extra={"fields": {"tenant": name}})
            except (DeltacomeError, OSError) as error:
                log.warning("delta refused", extra={"fields": {"tenant": name, "reason": str(error)}})

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

    async def release(self, loaded: Loaded) -> None:
        """Give back what `lease` returned."""
        loaded.uses -= 1
        if not loaded.uses and loaded not in self._current():
            self._drop(loaded)
        async with self.released:
            self.released.notify_all()

    def _current(self) -> set[Loaded]:
        return {self.base, *(delta.loaded for delta in self.deltas.values() if delta.loaded is not None)}

    async def _load_on_demand(self, name: str) -> Loaded:
        if name == self.name:
            return self.base
        while True:
            delta = self.deltas.get(name)
            if delta is None:
                raise UnknownModelError(f"there is no model {name!r}")
            if delta.loaded is not None:
                return delta.loaded
            async with self.loading:
                if delta.loaded is not None or self.deltas.get(name) is not delta:
                    continue
                loaded = await self._load_from_disk(name, delta)
                if self.deltas.get(name) is delta:
                    self.metrics.delta_bytes.labels(name).set(loaded.bytes)
                else:  # removed or replaced meanwhile
                    self._drop(loaded)

    async def _load_from_disk(self, name: str, delta: RegisteredDelta) -> Loaded:
        """Read a delta from disk, and keep it."""
        await self._make_room(name, int(1.1 * delta.size))  # a bound on what it takes in memory
        return self._keep_in_memory(
            name, delta, await asyncio.get_running_loop().run_in_executor(self._reader, self._read, name, delta.folder)
        )

    def preload(self, name: str) -> None:
        """Load a delta before the server starts, if the memory limit has room for it.

        Raises:
            DeltacomeError: if its files are broken.
        """
        delta = self.deltas[name]
        loaded = self._read(name, delta.folder)
        if (
            self.memory_limit is None
            or sum(other.bytes for other in self.in_memory) + loaded.bytes <= self.memory_limit
        ):
            self._keep_in_memory(name, delta, loaded)

    def _keep_in_memory(self, name: str, delta: RegisteredDelta, loaded: Loaded) -> Loaded:
        delta.loaded = loaded
        self.in_memory.add(loaded)
        self.metrics.loads.labels(name).inc()
        log.info("delta loaded", extra={"fields": {"tenant": name, "bytes": loaded.bytes}})
        return loaded

    def _read(self, name: str, folder: Path) -> Loaded:
        return self._loaded(self.model.tenants.read(name, folder))

    def _loaded(self, tenant: Tenant | None) -> Loaded:
        key = self._language_files(tenant), frozenset() if tenant is None else tenant.ends
        language = self._languages.get(key)
        if language is None:
            tokenizer, ends = load_language(self.base_checkpoint, tenant)
            language = Language(tokenizer, Encoder(tokenizer, self.chat_template), ends)
            self._languages[key] = language
        return Loaded(tenant, language, self._vocabulary(tenant))

    def _language_files(self, tenant: Tenant | None) -> frozenset[tuple[str, str]]:
        """Names and digests of the files that a model's tokenizer and template come from."""
        if tenant is None or tenant.artifact is None:
            base = self.base_checkpoint
            files = {path.name: str(base.sidecar_digest(path.name)) for path in base.sidecars()}
        else:
            files = {**tenant.artifact.base_files, **tenant.artifact.files}
        others = {"config.json", "README.md"}
        return frozenset(
            (name, digest) for name, digest in files.items() if name not in others and not name.endswith(".safetensors")
        )

    def _vocabulary(self, tenant: Tenant | None) -> int:
        """Tokens that a model knows."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        change = None if tenant is None else tenant.changes.get(name)
        count: int = embedding.weight.shape[0]
        return count if change is None else change.vocabulary(count)

    async def _make_room(self, name: str, size: int) -> None:
        """Drop deltas that nobody uses, the longest unused first, until there is room; wait for one if need be."""
        if self.memory_limit is None:
            return
        if size > self.memory_limit:
            raise NoRoomError(f"{name} takes {size:,} bytes and the memory limit is {self.memory_limit:,}; raise it")
        while sum(loaded.bytes for loaded in self.in_memory) + size > self.memory_limit:
            idle = [
                (delta.loaded.last_used, key, delta)
                for key, delta in self.deltas.items()
                if delta.loaded is not None and not delta.loaded.uses
            ]
            if idle:
                _, key, delta = min(idle)
                assert delta.loaded is not None
                self._drop(delta.loaded)
                delta.loaded = None
                self.metrics.delta_bytes.labels(key).set(0)
                self.metrics.evictions.labels(key).inc()
                log.info("delta evicted", extra={"fields": {"tenant": key}})
            else:
                async with self.released:
                    await self.released.wait()

    def _drop(self, loaded: Loaded) -> None:
        """Let go of a model that no name has any more, unless requests use it: the last of them lets it go."""
        if not loaded.uses:
            self.in_memory.discard(loaded)


def _stamp(folder: Path) -> tuple[int, int]:
    """What changes when an artifact is written anew."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError as error:
        raise DeltacomeError(f"{folder.name} holds no artifact: there is no {MANIFEST}") from error
    return status.st_mtime_ns, status.st_ino
