"""What a machine keeps of a store: whole or not at all, within its bytes, and never taken from who uses it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Save, files, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress
from deltacome.store.cache import Cache, cache_folder
from deltacome.store.entry import Entry
from deltacome.store.store import Store


class Team:
    """A store with deltas `a` and `b`, and `c` on `b`. fetched: files that were copied from it."""

    def __init__(self, save: Save, folder: Path) -> None:
        self.folder, self.fetched = folder, 0
        model = make_model()
        base = save(model, "base")
        self.store = Store(str(folder / "store"))
        self.entries: dict[str, Entry] = {}
        for seed, name in enumerate("abc", 1):
            fine_tune(model, seed)
            compress(base, save(model, name), folder / name, ratio=4, parent=folder / "b" if name == "c" else None)
            self.entries[name] = self.store.entry(self.store.push(folder / name, name)[0])

    def size(self, names: str) -> int:
        """Bytes of the files of deltas, equal ones once."""
        contents = {digest: content for name in names for digest, content in self.entries[name].contents.items()}
        return sum(content.size for content in contents.values())


@pytest.fixture(scope="module")
def own_team(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Team:
    return Team(save, tmp_path_factory.mktemp("team"))


@pytest.fixture
def team(own_team: Team, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    fetch = Store.fetch

    def counted(*arguments: Any) -> None:
        own_team.fetched += 1
        fetch(*arguments)

    monkeypatch.setattr(Store, "fetch", counted)
    own_team.fetched = 0
    return own_team


def in_it(cache: Cache) -> int:
    """Bytes of all contents; nothing else takes any."""
    links = {path.stat().st_ino for path in cache.folder.rglob("*") if path.is_file()}
    contents = list((cache.folder / "contents").iterdir())
    assert links - {path.stat().st_ino for path in contents} == {
        path.stat().st_ino for path in cache.folder.rglob("*lock")
    }
    assert not list((cache.folder / "coming").iterdir())
    return sum(path.stat().st_size for path in contents)


def test_deltas_are_fetched_once_and_share_what_is_equal(team: Team, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    held = [cache.hold(team.store, team.entries[name]) for name in "abcabc"]
    assert team.fetched == len({digest for name in "abc" for digest in team.entries[name].contents})
    for name, own in zip("abcabc", held, strict=True):
        assert files(own.folder) == files(team.folder / name)
        Artifact(own.folder).check_digests()
        own.close()
    assert in_it(cache) == team.size("abc")
    other = Cache(tmp_path / "cache")  # of another server, or the next
    other.hold(team.store, team.entries["c"]).close()
    assert team.fetched == len({digest for name in "abc" for digest in team.entries[name].contents})


def test_the_longest_unused_goes_and_what_is_used_stays(team: Team, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", team.size("ab"))
    a = cache.hold(team.store, team.entries["a"])
    cache.hold(team.store, team.entries["b"]).close()
    time.sleep(0.01)
    a.close()
    cache.hold(team.store, team.entries["a"]).close()  # used after `b`
    fetched = team.fetched
    tight = Cache(tmp_path / "cache", team.size("abc") - 1)
    c = tight.hold(team.store, team.entries["c"])  # on `b`, which is not fetched again though its delta goes
    assert in_it(tight) == team.size("bc") or in_it(tight) == team.size("ac")
    assert team.fetched == fetched + len(team.entries["c"].contents.keys() - team.entries["b"].contents.keys())
    with pytest.raises(DeltacomeError, match=r"no room for .* bytes: its limit is .*, and what is in it is used"):
        Cache(tmp_path / "cache", team.size("c")).hold(team.store, team.entries["a"])
    Artifact(c.folder).check_digests()
    c.close()
    Cache(tmp_path / "cache", team.size("a")).hold(team.store, team.entries["a"]).close()
    assert in_it(cache) == team.size("a")
    with pytest.raises(DeltacomeError, match="no room"):
        Cache(tmp_path / "cache", team.size("c") - 1).hold(team.store, team.entries["c"])


def test_what_another_process_uses_stays(team: Team, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", team.size("a"))
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()

    def use() -> None:
        held = Cache(tmp_path / "cache").hold(team.store, team.entries["a"])
        ready.set()
        over.wait(30)
        Artifact(held.folder).check_digests()

    process = context.Process(target=use)
    process.start()
    assert ready.wait(30)
    with pytest.raises(DeltacomeError, match="no room"):
        cache.hold(team.store, team.entries["b"])
    over.set()
    process.join(30)
    assert process.exitcode == 0
    Cache(tmp_path / "cache", team.size("b")).hold(team.store, team.entries["b"]).close()
    assert in_it(cache) == team.size("b")


def test_files_that_are_damaged_here_are_fetched_again(team: Team, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    held = cache.hold(team.store, team.entries["c"])
    held.close()
    whole = team.fetched
    for number, path in enumerate(sorted(p for p in (tmp_path / "cache/contents").iterdir())):
        content = path.read_bytes()
        if number % 2:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # through the link, too
        else:
            (next(p for p in (tmp_path / "cache/deltas").rglob("*") if p.is_file() and p.samefile(path))).unlink()
        again = cache.hold(team.store, team.entries["c"])
        assert files(again.folder) == files(team.folder / "c")
        Artifact(again.folder).check_digests()
        again.close()
        assert in_it(cache) == team.size("c")
    assert team.fetched == whole + whole // 2


def test_damage_in_the_store_leaves_nothing(team: Team, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    content = max(team.entries["a"].contents.values(), key=lambda content: content.size)
    path = team.folder / "store" / content.path
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(DeltacomeError, match=r"is damaged \(its SHA-256 differs\)"):
            cache.hold(team.store, team.entries["a"])
        cache.hold(team.store, team.entries["b"]).close()
        assert in_it(cache) == team.size("b")
    path.write_bytes(whole)
    cache.hold(team.store, team.entries["a"]).close()


def test_a_process_killed_while_it_fetches(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each file: what it leaves counts for nothing, and is cleared away."""
    cache = Cache(tmp_path / "cache", team.size("c"))
    context = multiprocessing.get_context("fork")
    wanted = len(team.entries["c"].contents)
    for number in range(wanted):

        def die(number: int = number) -> None:
            fetch, done = Store.fetch, iter(range(wanted))

            def last(*arguments: Any) -> None:
                fetch(*arguments)
                if next(done) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            Store.fetch = last  # type: ignore[method-assign]
            cache.hold(team.store, team.entries["c"])

        process = context.Process(target=die)
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    held = cache.hold(team.store, team.entries["c"])
    assert len(Artifact(held.folder).chain) == 2 and in_it(cache) == team.size("c")
    held.close()


def test_many_processes_at_once(team: Team, tmp_path: Path) -> None:
    """They fetch and use deltas in a cache that has room for two of the three."""
    context = multiprocessing.get_context("fork")

    def work(seed: int) -> None:
        cache = Cache(tmp_path / "cache", team.size("ab"))
        for number in range(12):
            name = "abc"[(seed + number * (seed + 1)) % 3]
            try:
                held = cache.hold(team.store, team.entries[name])
            except DeltacomeError as error:
                assert "no room" in str(error)
                continue
            Artifact(held.folder).check_digests()
            assert files(held.folder) == files(team.folder / name)
            held.close()

    processes = [context.Process(target=work, args=(seed,)) for seed in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert in_it(Cache(tmp_path / "cache")) <= team.size("ab")
    for name in "abc":
        Cache(tmp_path / "cache", team.size("bc")).hold(team.store, team.entries[name]).close()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DELTACOME_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache/deltacome"
    monkeypatch.setenv("DELTACOME_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    (tmp_path / "file").touch()
    with pytest.raises(DeltacomeError, match=r"cannot make the cache .*file"):
        Cache(tmp_path / "file")
