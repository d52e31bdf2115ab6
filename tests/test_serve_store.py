"""A server over a store: what it shows, fetches, keeps and drops, and a store that is slow or damaged."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from openai import APIStatusError

import deltacome
from commands import fail
from conftest import Save, fine_tune, make_model
from deltacome import Artifact, DeltacomeError
from deltacome.serve.engine.scheduler import Limits
from deltacome.serve.metrics import Metrics
from deltacome.serve.registry import NoRoomError, Registry, UnknownModelError
from deltacome.serve.server import build
from deltacome.store import fetching as module
from deltacome.store.cache import Cache
from deltacome.store.fetching import FetchError, Fetching
from deltacome.store.place import Place
from deltacome.store.store import Store
from serving import CHAT, alone, client, serving, until

pytest_plugins = ["serving"]
ADDRESS = "memory://serving/store"
Make = Callable[..., Registry]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return deltacome.load(folder / "base")


@pytest.fixture(scope="module")
def foreign(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of another base."""
    other = make_model(seed=5)
    base = save(other, "other")
    fine_tune(other, 3)
    out = tmp_path_factory.mktemp("foreign") / "delta"
    deltacome.compress(base, save(other, "tuned"), out, ratio=4)
    return out


@pytest.fixture
def store(folder: Path, foreign: Path) -> Iterator[Store]:
    """`a`, `b`, and `foreign`, which is on another base."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    found = Store(ADDRESS)
    for name in "ab":
        found.push(folder / "deltas" / name, name)
    found.push(foreign, "foreign")
    yield found
    memory.store.clear()


@pytest.fixture
def make(model: Any, folder: Path, store: Store, tmp_path: Path) -> Make:
    """A registry over the base and the store; room: for so many deltas."""

    def do(room: float | None = None, cache: int | None = None) -> Registry:
        limit = None if room is None else int(room * Artifact(folder / "deltas/a").bytes)
        checkpoint = model.tenants.checkpoint
        fetching = Fetching(store, Cache(tmp_path / "cache", cache), checkpoint.fingerprint())
        registry = Registry(model, checkpoint, "base", Metrics(), memory_limit=limit, fetching=fetching)
        asyncio.run(registry.look_into_store())
        return registry

    return do


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def hang(monkeypatch: pytest.MonkeyPatch, *names: str) -> threading.Event:
    """Downloads of contents of these deltas wait, before their first byte, for what is returned."""
    free, download = threading.Event(), Place.download
    versions = [Store(ADDRESS).look().find(name) for name in names]
    own = {content.path for version in versions for content in Store(ADDRESS).entry(version).contents.values()}

    def slow(place: Place, name: str, *more: Any) -> None:
        if name in own:
            free.wait(30)
        download(place, name, *more)

    monkeypatch.setattr(Place, "download", slow)
    return free


def test_names_versions_and_tags(make: Make, store: Store, folder: Path) -> None:
    first = store.look().find("a").version
    store.tag("a", "stable")
    registry = make()
    assert sorted(registry.deltas) == ["a", "b"]  # of this base
    assert registry.deltas["a"].size == Artifact(folder / "deltas/a").bytes

    async def work() -> None:
        a = await registry.lease("a")
        stable = await registry.lease("a:stable")
        assert (await registry.lease(f"a:{first}")).bytes == stable.bytes == a.bytes
        for name in ("c", "a:other", "a:", "a:0123456789ab", ":stable"):
            with pytest.raises(UnknownModelError):
                await registry.lease(name)
        with pytest.raises(UnknownModelError, match=r"is a delta on other\d*, which is another base"):
            await registry.lease("foreign")
        store.push(folder / "deltas/b", "a")
        await registry.look_into_store()
        assert registry.deltas["a"].loaded is None and a in registry.in_memory
        registry.release(a)
        assert a not in registry.in_memory
        b = await registry.lease("b")
        assert (await registry.lease("a")).bytes == b.bytes and registry.deltas["a:stable"].loaded is stable
        store.tag("a", "stable")
        await registry.look_into_store()
        assert "a:stable" not in registry.deltas and f"a:{first}" in registry.deltas
        assert (await registry.lease("a:stable")).bytes == b.bytes
        for version in store.look().versions("b"):
            store.remove(str(version))
        await registry.look_into_store()
        assert "b" not in registry.deltas and b in registry.in_memory

    run(work())


def test_names_of_one_version_at_once(make: Make, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is read, and its files are fetched, while others ask for the same under any of its names."""
    registry = make()
    version = str(store.look().find("a"))
    store.push(Path(registry.base_checkpoint.source).parent / "deltas/b", "a")
    store.tag(version, "stable")
    run(registry.look_into_store())
    fetched, fetch = [], Store.fetch

    def slow(*arguments: Any) -> None:
        fetched.append(arguments[1])
        time.sleep(0.05)
        fetch(*arguments)

    monkeypatch.setattr(Store, "fetch", slow)

    async def work() -> None:
        found = await asyncio.gather(*(registry.lease(name) for name in ("a:stable", version, "a:stable", version)))
        assert found[0] is found[2] and found[1] is found[3] and found[0].bytes == found[1].bytes
        assert len(fetched) == len({content.sha256 for content in fetched})

    run(work())


def test_a_name_that_is_just_being_loaded_is_nobodys(make: Make, store: Store) -> None:
    registry = make()
    store.tag("a", "stable")
    run(registry.look_into_store())
    with registry._claim("a:stable"), pytest.raises(UnknownModelError):
        run(registry.lease("a:stable"))


def test_other_deltas_keep_their_names(make: Make, folder: Path) -> None:
    registry = make()
    registry.remove("a")
    registry.add("a", folder / "deltas/b")
    run(registry.look_into_store())
    assert registry.deltas["a"].entry is None


def test_a_store_that_hangs_holds_nobody_up(make: Make, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one delta: what is not there yet takes none, and who waits for it gets a sentence in time."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.5)
    registry = make(room=1.5)
    free = hang(monkeypatch, "a")
    assert registry.fetching is not None

    async def work() -> None:
        started = time.monotonic()
        a = [asyncio.create_task(registry.lease("a")) for _ in range(3)]
        await asyncio.sleep(0.1)
        b = await asyncio.wait_for(registry.lease("b"), 5)
        assert not any(task.done() for task in a)
        with pytest.raises(FetchError, match=r"has not answered for 0\.5 s; the others go on"):
            await a[0]
        assert time.monotonic() - started < 3
        assert [type(error) for error in await asyncio.gather(*a, return_exceptions=True)] == [FetchError] * 3
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(FetchError, match="does not answer"):  # at once
                await asyncio.wait_for(registry.lease("a"), 0.2)
        assert threading.active_count() <= before
        free.set()
        registry.release(b)
        while registry.fetching is not None and registry.fetching._busy:
            await asyncio.sleep(0.01)
        registry.release(await registry.lease("a"))

    run(work())


def test_slow_is_not_silent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta that takes longer than the store may be silent, because it comes in parts."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("deltacome.store.place.CHUNK", 2000)
    registry = make()
    read = fsspec.implementations.memory.MemoryFile.read

    def slow(self: Any, size: int = -1) -> bytes:
        time.sleep(0.06)
        return bytes(read(self, size))

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", slow)
    started = time.monotonic()
    run(registry.lease("a"))
    assert time.monotonic() - started > 0.6


def test_a_look_that_fails_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make()

    def broken(self: Place, folder: str = "") -> list[str]:
        raise DeltacomeError("the store cannot be listed: no route")

    async def work() -> None:
        monkeypatch.setattr(Place, "list", broken)
        with pytest.raises(FetchError, match="no route"):
            await registry.look_into_store()
        assert sorted(registry.deltas) == ["a", "b"]
        registry.release(await registry.lease("a"))

    run(work())


def damage(store: Store, name: str, entry: bool = False) -> str:
    memory = fsspec.filesystem("memory")
    version = store.look().find(name)
    largest = max(store.entry(version).contents.values(), key=lambda content: content.size)
    path = "/serving/store/" + (version.path if entry else largest.path)
    content = memory.cat_file(path)
    memory.pipe_file(path, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    return path


def test_damage_is_that_tenants_alone(make: Make, store: Store) -> None:
    damage(store, "a")
    registry = make()

    async def work() -> None:
        with pytest.raises(FetchError, match="damaged"):
            await registry.lease("a")
        registry.release(await registry.lease("b"))

    run(work())
    damage(store, "b", entry=True)
    fresh = make()
    assert list(fresh.deltas) == ["a"]
    with pytest.raises(FetchError, match="its entry is damaged"):
        run(fresh.lease("b"))


def test_pinned_deltas_are_never_dropped(make: Make, store: Store, folder: Path) -> None:
    registry = make(room=2.6)
    asyncio.run(registry.pin(["a"]))
    pinned = registry.deltas["a"].loaded
    assert pinned is not None
    registry.add("c", folder / "deltas/b")

    async def work() -> None:
        for name in ("b", "c", "b", "c"):
            registry.release(await registry.lease(name))
            assert registry.deltas["a"].loaded is pinned
        registry.deltas["b"].size *= 2
        if registry.deltas["b"].loaded is not None:
            registry._evict()
        with pytest.raises(
            NoRoomError, match=r"the memory limit is [\d,]+, of which pinned deltas take [\d,]+; raise it"
        ):
            await registry.lease("b")
        registry.release(await registry.lease("c"))
        store.push(folder / "deltas/b", "a")
        await registry.look_into_store()
        while registry.deltas["a"].loaded is None:  # nobody has asked for it
            await asyncio.sleep(0.01)

    run(work())
    with pytest.raises(UnknownModelError, match="there is no model 'nothing'"):
        asyncio.run(make().pin(["nothing"]))
    with pytest.raises(NoRoomError, match="of which pinned deltas take"):
        asyncio.run(make(room=1.5).pin(["a", "b"]))


def test_a_cache_too_small_for_what_is_asked(make: Make, store: Store) -> None:
    size = sum(content.size for content in store.entry(store.look().find("a")).contents.values())
    registry = make(cache=size // 2)

    async def work() -> None:
        with pytest.raises(FetchError, match=r"no room .* raise --store-cache"):
            await registry.lease("a")

    run(work())


# The whole server.


def test_a_server_over_a_store(
    folder: Path,
    store: Store,
    tmp_path: Path,
    merged: dict[str, tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DELTACOME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltacome.serve.http.app.STORE_SECONDS", 0.05)
    free = hang(monkeypatch, "b")
    store.push(folder / "deltas/a", "broken")
    version = str(store.look().find("a"))
    app = build(folder / "base", {}, store=ADDRESS)
    with serving(app) as address:
        api = client(address)
        listed = {found.id: found for found in api.models.list()}
        assert sorted(listed) == ["a", "b", "base", "broken"]

        def say(name: str) -> Any:
            return api.chat.completions.create(model=name, messages=CHAT, max_tokens=8, temperature=0)

        waiting: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: waiting.update(b=say("b")))
        thread.start()
        for name in ("a", version, "base"):  # while `b` is being fetched
            like = "base" if name == "base" else "a"
            assert say(name).choices[0].message.content == alone(merged, like, CHAT[0]["content"], 8)
        assert not waiting
        free.set()
        thread.join(30)
        assert waiting["b"].choices[0].message.content
        shutil.rmtree(tmp_path / "cache/deltas")
        shutil.rmtree(tmp_path / "cache/contents")
        (tmp_path / "cache/deltas").mkdir()
        (tmp_path / "cache/contents").mkdir()
        damage(store, "broken")  # and `a`, which is in memory
        with pytest.raises(APIStatusError) as error:
            say("broken")
        assert error.value.status_code == 503 and "broken cannot be fetched from the store" in str(error.value)
        assert say("a").choices[0].message.content == alone(merged, "a", CHAT[0]["content"], 8)
        store.push(folder / "deltas/b", "new")
        until(lambda: "new" in [found.id for found in api.models.list()])
        assert say("new").choices[0].message.content == waiting["b"].choices[0].message.content
    reasons = [record.fields["reason"] for record in caplog.records if record.message == "delta not fetched"]
    assert len(reasons) == 1 and "is damaged (its SHA-256 differs)" in reasons[0]


def test_what_a_waiting_request_asks_for_is_fetched_meanwhile(
    folder: Path, store: Store, tmp_path: Path, slow_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one answer at a time: `b` is in memory before the answer of `a` ends."""
    monkeypatch.setenv("DELTACOME_CACHE", str(tmp_path / "cache"))
    app = build(folder / "base", {}, store=ADDRESS, limits=Limits(1))
    deltas = app.state.service.registry.deltas
    with serving(app) as address:
        api = client(address)
        stream = iter(api.completions.create(model="a", prompt="Hello", max_tokens=400, stream=True, seed=1))
        parts, answers = [next(stream)], []
        thread = threading.Thread(target=lambda: answers.append(api.completions.create(model="b", prompt="Hello")))
        thread.start()
        while deltas["b"].loaded is None:
            parts.append(next(stream))
        assert not answers and parts[-1].choices[0].finish_reason is None
        parts += list(stream)
        thread.join(30)
        assert len(parts) > 20 and answers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "{tmp}/nothing"], "there is no store at"),
        (["--store", ADDRESS, "--store-cache", "much"], "much is no size"),
        (["--store", ADDRESS, "--pin", "c"], "there is no model 'c'"),
        (["--store", ADDRESS, "--pin", "foreign"], "another base"),
        (["--store", ADDRESS, "--pin", "a", "--memory-limit", "1KB"], "the memory limit is 1,000"),
        (["--pin", "c"], "there is no model 'c'"),
    ],
)
def test_bad_commands(
    folder: Path, store: Store, tmp_path: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTACOME_CACHE", str(tmp_path / "cache"))
    fail(said, "serve", folder / "base", *(option.format(tmp=tmp_path) for option in options))
