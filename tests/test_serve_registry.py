"""The deltas of a server and its folder, whatever happens at once and whatever lies there."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import deltacome
from deltacome import Artifact, DeltacomeError
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.files import sha256
from deltacome.format.manifest import MANIFEST, write_manifest
from deltacome.serve import registry as module
from deltacome.serve.metrics import UNLOADED, Metrics
from deltacome.serve.registry import BusyNameError, NoRoomError, Registry, UnknownModelError
from serving import client, make_app, metric, post_json, serving, until

pytest_plugins = ["serving"]
Make = Callable[..., Registry]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return deltacome.load(folder / "base")


@pytest.fixture
def make(model: Any, folder: Path) -> Make:
    """A registry over the base; `deltas` are known from the start, and there is room for so many."""

    def do(deltas: str = "", room: float | None = None, watched: Path | None = None) -> Registry:
        artifact = Artifact(folder / "deltas/a")
        limit = None if room is None else int(room * artifact.bytes)
        checkpoint = model.tenants.checkpoint
        registry = Registry(model, checkpoint, "base", Metrics(), folder=watched, memory_limit=limit)
        for name in deltas:
            registry.add(name, folder / "deltas" / name)
        return registry

    return do


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def longest_pause(work: Coroutine[Any, Any, Any]) -> float:
    """Seconds that the event loop was held up at most while the work was done."""
    task, longest = asyncio.create_task(work), 0.0
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - before)
    await task
    return longest


# Loads at once, and room for them.


def test_a_load_that_finds_no_room_gives_up_and_holds_nobody_up(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_SECONDS", 0.3)
    registry = make("ab", room=2.6)
    registry.add("big", folder / "deltas/a")
    registry.deltas["big"].size *= 2

    async def work() -> None:
        a = await registry.lease("a")
        big = asyncio.create_task(registry.lease("big"))
        loading = asyncio.create_task(registry.load("x", folder / "deltas/a", replace=True))
        await asyncio.wait_for(loading, 5)  # it fits
        x, b = await registry.lease("x"), asyncio.create_task(registry.lease("b"))
        await asyncio.sleep(0.05)
        assert await registry.lease("a") is a and not big.done() and not b.done()
        with pytest.raises(NoRoomError, match=r"no room for y came free in 0\.3 s"):
            await registry.load("y", folder / "deltas/b")
        assert "y" not in registry.deltas
        for loaded in (x, a, a):
            registry.release(loaded)
        registry.release(await b)
        await big
        assert registry.deltas["big"].loaded and registry._coming == 0

    run(work())


@pytest.mark.parametrize("replace", [False, True])
def test_one_of_two_loads_of_a_name_at_once_is_told(make: Make, folder: Path, replace: bool) -> None:
    registry = make()

    async def work() -> None:
        if replace:
            await registry.load("x", folder / "deltas/a")
        loads = [registry.load("x", folder / "deltas" / name, replace=replace) for name in "ab"]
        first = asyncio.create_task(loads[0])
        await asyncio.sleep(0)
        with pytest.raises(BusyNameError, match="just being loaded"):
            await loads[1]
        with pytest.raises(BusyNameError, match="just being loaded"):
            registry.remove("x")
        await first
        assert registry.deltas["x"].folder == folder / "deltas/a"
        assert len(registry.in_memory) == 1
        registry.remove("x")
        assert not registry.in_memory

    run(work())


def test_a_load_that_fails_leaves_its_name_free(make: Make, folder: Path, tmp_path: Path) -> None:
    registry = make()
    shutil.copytree(folder / "deltas/a", tmp_path / "broken")
    content = bytearray((tmp_path / "broken/delta.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "broken/delta.safetensors").write_bytes(content)

    async def work() -> None:
        with pytest.raises(DeltacomeError, match="broken artifact"):
            await registry.load("x", tmp_path / "broken")
        await registry.load("x", folder / "deltas/a")

    run(work())


def test_who_waits_for_room_gets_it_when_a_delta_is_unloaded(make: Make) -> None:
    registry = make("ab", room=1.5)

    async def work() -> None:
        a = await registry.lease("a")
        waiting = [asyncio.create_task(registry.lease("b")) for _ in range(3)]
        await asyncio.sleep(0.05)
        registry.remove("a")
        assert not any(task.done() for task in waiting)
        registry.release(a)
        found = await asyncio.gather(*waiting)
        assert len({id(loaded) for loaded in found}) == 1 and found[0].uses == 3

    run(work())


def test_a_delta_that_nobody_waits_for_any_more_is_not_loaded(make: Make) -> None:
    registry = make("ab", room=1.5)

    async def work() -> None:
        a = await registry.lease("a")
        waiting = asyncio.create_task(registry.lease("b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0.05)
        assert registry.deltas["b"].arriving is None and registry.deltas["b"].wanted == 0
        registry.release(a)
        assert registry.deltas["a"].loaded is a
        gone = asyncio.create_task(registry.lease("b"))  # goes while it is being read
        await asyncio.sleep(0)
        registry.remove("b")
        with pytest.raises(UnknownModelError):
            await gone
        assert registry.in_memory <= {a} and registry._coming == 0

    run(work())


def test_series_of_an_unloaded_delta_are_gone(folder: Path) -> None:
    with serving(make_app(folder, deltas={}, folder=folder / "deltas")) as address:
        api = client(address)
        for i in range(3):
            name = f"new-{i}"
            assert post_json(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": "a"})[0] == 200
            running = api.completions.create(model=name, prompt="x", max_tokens=40, stream=True, seed=i)
            next(iter(running))
            assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
            list(running)
            assert post_json(address, "/v1/completions", {"model": f"none-{i}", "prompt": "x"})[0] == 404
        until(lambda: metric(address, f'deltacome_requests_total{{status="ok",tenant="{UNLOADED}"}}') == 3)
        text = client(address).with_options(base_url=address).get("/metrics", cast_to=str)
        assert "new-" not in text and "none-" not in text and 'tenant="a"' in text


# The watched folder.


def test_the_base_is_hashed_once_and_before_serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    plain = Checkpoint.fingerprint

    def fingerprint(self: Checkpoint) -> str:
        if self._fingerprint is None:
            hashed.append(self)
        return plain(self)

    monkeypatch.setattr(Checkpoint, "fingerprint", fingerprint)
    app = make_app(folder, deltas={}, folder=folder / "deltas")
    assert len(hashed) == 1
    with serving(app) as address:
        assert client(address).completions.create(model="a", prompt="x", max_tokens=1).choices
    make_app(folder, deltas={"a": folder / "deltas/a"})
    assert len(hashed) == 2


def with_file(delta: Path, name: str, content: bytes) -> None:
    """Give a delta a file of its own, whose digest is right."""
    (delta / name).write_bytes(content)
    manifest = json.loads((delta / MANIFEST).read_bytes())
    del manifest["sha256"], manifest["ratio"]
    manifest["base_files"].pop(name, None)
    manifest["files"][name] = sha256(delta / name)
    write_manifest(delta, manifest, 1)


def with_pipe(delta: Path, name: str) -> None:
    """Put a pipe, from which nothing ever comes, in the place of a file."""
    with_file(delta, name, b"{}")
    (delta / name).unlink()
    os.mkfifo(delta / name)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated config.json": (lambda delta: with_file(delta, "config.json", b'{"rope'), "cannot be read"),
    "deep JSON in config.json": (lambda delta: with_file(delta, "config.json", b"[" * 10**5), "cannot be read"),
    "a list as config.json": (lambda delta: with_file(delta, "config.json", b"[]"), "cannot be read"),
    "deep JSON": (lambda delta: (delta / MANIFEST).write_bytes(b'{"format_version":' + b"[" * 10**5), "is damaged"),
    "nothing in it": (lambda delta: (delta / MANIFEST).write_bytes(b""), "is damaged"),
    "a pipe for weights": (lambda delta: with_pipe(delta, "delta.safetensors"), "is no file"),
    "a pipe for config.json": (lambda delta: with_pipe(delta, "config.json"), "is no file"),
    "an odd name": (lambda delta: delta.rename(delta.parent / "a\nb"), "rename its folder"),
}


@pytest.mark.parametrize(("spoil", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_lies_in_the_folder_harms_no_other_delta(
    make: Make, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any], said: str
) -> None:
    for name in ("a", "m", "z"):
        shutil.copytree(folder / "deltas/a", tmp_path / name)
    spoil(tmp_path / "m")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "outside").symlink_to(folder / "deltas/b")
    registry = make(watched=tmp_path)
    for _ in range(2):
        run(registry.rescan())
        assert set(registry.deltas) == {"a", "z"}
    told = [record.fields for record in caplog.records if record.message == "delta refused"]  # type: ignore[attr-defined]
    assert len(told) == 2  # once each, however often it is looked at
    assert next(fields["reason"] for fields in told if fields["tenant"] == "loop").startswith("there is no folder")
    assert said in next(fields["reason"] for fields in told if fields["tenant"] in ("m", "a\nb"))


def test_a_folder_that_may_not_be_read_or_vanishes_midway(
    make: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forbidden", "vanishing", "z"):
        shutil.copytree(folder / "deltas/a", tmp_path / name)
    plain, opened = Path.iterdir, Artifact

    def iterdir(self: Path) -> Any:
        if self.name == "forbidden":
            raise PermissionError(13, "Permission denied")
        return plain(self)

    def open_vanishing(place: Path) -> Artifact:
        if place.name == "vanishing":
            shutil.rmtree(place)
        return opened(place)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(module, "Artifact", open_vanishing)
    registry = make(watched=tmp_path)
    run(registry.rescan())
    assert set(registry.deltas) == {"z"}
    monkeypatch.undo()
    run(registry.rescan())
    assert set(registry.deltas) == {"forbidden", "z"}


def test_a_half_copied_delta_is_looked_at_again(make: Make, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "deltas/a", tmp_path / "it")
    weights = tmp_path / "it" / "delta.safetensors"
    content = weights.read_bytes()
    registry = make(watched=tmp_path)
    for part in (b"", content[:1000], content[:-1]):
        weights.write_bytes(part)
        run(registry.rescan())
        assert not registry.deltas
    weights.write_bytes(content)
    run(registry.rescan())
    assert set(registry.deltas) == {"it"}
    (tmp_path / "it" / "README.md").write_text("mine")
    known = registry.deltas["it"]
    run(registry.rescan())
    assert registry.deltas["it"] is known  # the card is no part of it


def test_nothing_is_read_on_the_event_loop(
    make: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Artifact

    def open_slowly(place: Path) -> Artifact:
        time.sleep(0.3)
        return opened(place)

    monkeypatch.setattr(module, "Artifact", open_slowly)
    shutil.copytree(folder / "deltas/a", tmp_path / "it")
    registry = make(watched=tmp_path)
    assert run(longest_pause(registry.rescan())) < 0.2
    assert run(longest_pause(registry.load("new", tmp_path / "it"))) < 0.2
    assert set(registry.deltas) == {"it", "new"}
