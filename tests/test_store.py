"""A store of deltas, in folders and in memory: pushes and pulls at once, killed, and of what somebody has damaged."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import fail, succeed
from conftest import Save, files, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress
from deltacome.format.manifest import MANIFEST, MODEL_CARD
from deltacome.outputs import work_folder
from deltacome.store import store as module
from deltacome.store.entry import CONTENTS, Entry
from deltacome.store.place import Place
from deltacome.store.store import HOURS, Store, earlier

Deltas = dict[str, Path]


@pytest.fixture(scope="module")
def deltas(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    """Two deltas, `c` on `b`, and `d` on `c`."""
    folder = tmp_path_factory.mktemp("deltas")
    model = make_model()
    base = save(model, "base")
    for seed, name in enumerate("abcd", 1):
        fine_tune(model, seed)
        parent = folder / {"c": "b", "d": "c"}[name] if name in "cd" else None
        compress(base, save(model, name), folder / name, ratio=4, parent=parent)
    return {name: folder / name for name in "abcd"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of moto's S3, where that is installed (`pip install s3fs 'moto[server]'`)."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, ("key", "secret", "us-east-1"), strict=True):
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/{tmp_path.name}/store"
        return
    yield {"folder": f"{tmp_path}/store", "file": f"file://{tmp_path}/store", "memory": "memory://team/store"}[
        request.param
    ]
    forget()


def forget() -> None:
    """Empty the memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def held(address: str) -> dict[str, bytes]:
    """The files of a store by their names."""
    files, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(root).lstrip("/"): files.cat_file(path) for path in files.find(root)}


def test_commands(address: str, deltas: Deltas, tmp_path: Path) -> None:
    where = ["--store", address]
    pushed = json.loads(succeed("store", "push", deltas["a"], "math", *where, "--json"))
    first = pushed["version"]
    assert pushed["bytes_sent"] == sum(map(len, files(deltas["a"]).values()))
    before = held(address)
    again = json.loads(succeed("store", "push", deltas["a"], "math", *where, "--json"))
    assert again == {**pushed, "bytes_sent": 0} and held(address) == before
    assert "math:" in succeed("store", "push", deltas["b"], "math", *where)
    assert succeed("store", "tag", f"math:{first}", "stable", *where) == f"math:stable is math:{first}\n"
    for reference, name in (("math", "b"), (f"math:{first}", "a"), ("math:stable", "a")):
        out = tmp_path / reference.replace(":", "-")
        succeed("store", "pull", reference, "-o", out, *where)
        assert files(out) == files(deltas[name])
    newest, oldest = json.loads(succeed("store", "list", "math", *where, "--json"))
    assert newest["bytes"] == Artifact(deltas["b"]).bytes and newest["tags"] == []
    assert (
        oldest["version"] == first
        and oldest["tags"] == ["stable"]
        and oldest["base"] == Artifact(deltas["a"]).base_name
    )
    assert json.loads(succeed("store", "list", *where, "--json")) == [newest]
    table = succeed("store", "list", "math", *where)
    assert first in table and "stable" in table
    fail("has the tag stable", "store", "remove", f"math:{first}", *where)
    assert succeed("store", "remove", "math:stable", *where) == "removed the tag stable of math\n"
    succeed("store", "remove", f"math:{first}", *where)
    fail(f"no version and no tag {first} of math", "store", "pull", f"math:{first}", "-o", tmp_path / "no", *where)
    assert json.loads(succeed("store", "collect", *where, "--json"))["removed"] == 0  # not before a day has passed
    counts = json.loads(succeed("store", "collect", "--hours", "0", *where, "--json"))
    shared = set(files(deltas["a"]).values()) & set(files(deltas["b"]).values())
    assert counts == {
        "removed": len(set(files(deltas["a"]).values()) - shared),
        "left": len(set(files(deltas["b"]).values())),
    }
    assert not [name for name in held(address) if name.startswith("removed/")]
    succeed("store", "pull", "math", "-o", tmp_path / "left", *where)
    assert files(tmp_path / "left") == files(deltas["b"])


def test_no_bucket_is_made(bucket: str, deltas: Deltas) -> None:
    fail("what it is to lie in must be there", "store", "push", deltas["a"], "math", "--store", f"{bucket}-other/store")


def test_the_address_may_be_in_the_environment(deltas: Deltas, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTACOME_STORE", str(folder))
    succeed("store", "push", deltas["a"], "math")
    assert "math" in succeed("store", "list")
    monkeypatch.delenv("DELTACOME_STORE")
    fail("which store? write --store ADDRESS", "store", "list")


def test_versions_share_what_is_equal(address: str, deltas: Deltas, tmp_path: Path) -> None:
    store = Store(address)
    first, _ = store.push(deltas["a"], "math")
    changed = shutil.copytree(deltas["a"], tmp_path / "changed")
    (changed / MODEL_CARD).write_text("By hand.")
    second, sent = store.push(changed, "math")
    other, nothing = store.push(deltas["a"], "other")
    assert second.version != first.version == other.version and sent == len("By hand.") and nothing == 0
    digests = [name[len(CONTENTS) + 1 :][:64] for name in held(address) if name.startswith(CONTENTS)]
    assert len(digests) == len(set(digests)) == len(files(deltas["a"])) + 1
    store.push(deltas["a"], "math")  # what was pushed last is the newest, though the version was there before
    listing = store.look()
    assert listing.find("math").version == first.version and len(listing.versions("math")) == 2


def test_a_delta_comes_with_those_that_it_is_made_on(address: str, deltas: Deltas, tmp_path: Path) -> None:
    store = Store(address)
    _, sent = store.push(deltas["d"], "math")
    assert sent == sum(len(content) for content in {c for name in "bcd" for c in files(deltas[name]).values()})
    assert store.push(deltas["c"], "before")[1] == 0
    (tmp_path / "team").mkdir()
    store.pull("math", tmp_path / "team/mine")
    pulled = Artifact(tmp_path / "team/mine")
    assert [each.folder.name for each in pulled.chain] == ["mine", "c", "b"]
    assert {name: files(tmp_path / "team" / name) for name in "bc"} == {name: files(deltas[name]) for name in "bc"}
    store.pull("math", tmp_path / "team/again")  # those that it is made on are there
    assert len(Artifact(tmp_path / "team/again").chain) == 3
    (tmp_path / "else").mkdir()
    shutil.copytree(deltas["a"], tmp_path / "else/c")
    with pytest.raises(DeltacomeError, match="else/c is another; pull it into another folder"):
        store.pull("math", tmp_path / "else/mine")
    with pytest.raises(DeltacomeError, match="called b, which goes beside it"):
        store.pull("math", tmp_path / "b")
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["c"] and not (tmp_path / "b").exists()


# Damaged, and refused.


def damage(address: str, kind: str, change: Callable[[bytes], bytes], number: int = -1) -> str:
    """Change a file of a kind in a store, the last by default; its name."""
    files, root = fsspec.core.url_to_fs(address)
    path = sorted(path for path in files.find(root) if f"/{kind}/" in path)[number]
    files.pipe_file(path, change(files.cat_file(path)))
    return str(path)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"x", lambda c: b"y" + c[1:]])
def test_tampered_contents(address: str, deltas: Deltas, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    store = Store(address)
    store.push(deltas["a"], "math")
    for number in range(len(files(deltas["a"]))):
        before = held(address)
        name = damage(address, CONTENTS, change, number)
        fail("is damaged (its SHA-256 differs)", "store", "pull", "math", "-o", tmp_path / "out", "--store", address)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(work_folder(tmp_path / "out"), ignore_errors=True)  # files that are right
        fsspec.core.url_to_fs(address)[0].pipe_file(name, before[name.partition("store/")[2]])
    damage(address, CONTENTS, change)
    store.remove(str(store.look().find("math")))
    store.push(deltas["a"], "math")
    store.pull("math", tmp_path / "out")
    assert files(tmp_path / "out") == files(deltas["a"])


def lie(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **fields}).encode()


def rename(old: str, new: str) -> Callable[[bytes], bytes]:
    return lambda text: text.replace(old.encode(), new.encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"[" * 100_000,
        lie(digest="0" * 64),
        lie(names=["x"]),
        lie(names=["", "../x"], folders=[{}, {}]),
        lie(size=-1),
        lie(base=5),
        lie(more=1),
        rename(MANIFEST, f"../{MANIFEST}"),
        rename("contents/", "../contents/"),
        rename(MANIFEST, "other.json"),
    ],
)
def test_damaged_entries(folder: Path, deltas: Deltas, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    store = Store(str(folder))
    store.push(deltas["a"], "math")
    store.push(deltas["b"], "other")
    damage(str(folder), "deltas", change, 0)
    for _ in range(2):
        where = ["--store", folder]
        fail("its entry is damaged", "store", "pull", "math", "-o", tmp_path / "out", *where)
        fail("nothing was removed: math:", "store", "collect", "--hours", "0", *where)
        rows = json.loads(succeed("store", "list", *where, "--json"))
        assert "its entry is damaged" in rows[0]["error"] and rows[1]["name"] == "other"
        assert "damaged" in succeed("store", "list", *where)
    store.push(deltas["c"], "other")  # the others go on
    store.push(deltas["a"], "math")  # the same version, whole
    store.pull("math", tmp_path / "again")
    version = store.look().find("math")
    store.remove(str(version))
    assert store.collect(0)[0] > 0
    store.pull("other", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--store", "{tmp}/nothing"], "there is no store at {tmp}/nothing; deltacome store push makes one"),
        (["list", "--store", "webdav://host/deltas"], "not installed here (Install webdav4"),
        (["list", "--store", "odd://bucket/deltas"], "odd://bucket/deltas is no folder and no address"),
        (["push", "{a}", "math", "--store", "{a}"], "is no store, and it is not empty"),
        (["push", "{a}", "../math", "--store", "{tmp}/new"], "'../math' is no name in a store"),
        (["push", "{a}", "math:1", "--store", "{tmp}/new"], "'math:1' is no name in a store"),
        (["push", "{a}", "math", "--store", "{tmp}/new/store"], "what it is to lie in must be there: "),
        (["push", "{tmp}", "math", "--store", "{tmp}/new"], "is no compressed delta"),
        (["pull", "other", "-o", "{tmp}/out", "--store", "{tmp}/store"], "the store has no delta other"),
        (["pull", "math:x", "-o", "{tmp}/out", "--store", "{tmp}/store"], "no version and no tag x of math"),
        (["pull", "math", "-o", "{a}", "--store", "{tmp}/store"], "exists already"),
        (["list", "other", "--store", "{tmp}/store"], "the store has no delta other"),
        (["tag", "math", "0123456789ab", "--store", "{tmp}/store"], "'0123456789ab' is no tag"),
        (["tag", "math:x", "y", "--store", "{tmp}/store"], "no version and no tag x of math"),
        (["remove", "math", "--store", "{tmp}/store"], "which version of math?"),
    ],
)  # fmt: skip
def test_refusals(deltas: Deltas, tmp_path: Path, words: list[str], said: str) -> None:
    Store(str(tmp_path / "store")).push(deltas["a"], "math")
    before = files(tmp_path / "store/deltas"), sorted(path.name for path in tmp_path.iterdir())
    places = {"tmp": tmp_path, "a": deltas["a"]}
    fail(said.format(**places), "store", *(word.format(**places) for word in words))
    assert (files(tmp_path / "store/deltas"), sorted(path.name for path in tmp_path.iterdir())) == before


def test_a_delta_that_is_not_whole_is_not_pushed(deltas: Deltas, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(deltas["a"], tmp_path / "broken")
    content = (broken / "delta.safetensors").read_bytes()
    (broken / "delta.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fail("is not the file that was written", "store", "push", broken, "math", "--store", folder)
    assert not folder.exists()


def test_storage_that_fails(deltas: Deltas, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(folder))
    store.push(deltas["a"], "math")
    for name in ("ls", "cat_file", "open"):

        def broken(self: Any, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route\nto the host")

        with monkeypatch.context() as patch:
            patch.setattr("fsspec.implementations.local.LocalFileSystem." + name, broken)
            fail("no route", "store", "pull", "math", "-o", tmp_path / "out", "--store", folder)
    store.pull("math", tmp_path / "out")


# Killed, and at once.


class Step:
    """Lets a process be killed at the n-th of its steps, before it or in the middle."""

    def __init__(self, number: int, halfway: bool) -> None:
        self.left, self.halfway = number, halfway

    def __call__(self, function: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if self.halfway:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call


def in_a_process(work: Callable[[], Any]) -> int | None:
    """The exit code of a process that does something."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("halfway", [False, True])
def test_killed_pushes(deltas: Deltas, folder: Path, tmp_path: Path, halfway: bool) -> None:
    """A push of a second version, killed at each of its steps: readers see the first one, or the second one whole."""
    store = Store(str(folder))
    first, _ = store.push(deltas["a"], "math")

    def half_an_upload(place: Place, path: Path, name: str) -> None:
        (folder / name).write_bytes(path.read_bytes()[:100])

    def half_a_file(place: Place, name: str, content: bytes) -> None:
        (folder / name).with_name(".half.tmp").write_bytes(content[:100])

    killed = 0
    for number in range(1, 30):

        def push(number: int = number) -> None:
            step = Step(number, halfway)
            Place.upload = step(Place.upload, half_an_upload)  # type: ignore[method-assign]
            Place.write = step(Place.write, half_a_file)  # type: ignore[method-assign]
            Store(str(folder)).push(deltas["d"], "math")

        code = in_a_process(push)
        out = tmp_path / f"out{number}/delta"
        out.parent.mkdir()
        version = store.pull("math", out)
        assert (version == first) == (code != 0)
        assert files(out) == files(deltas["a" if code else "d"])
        if code == 0:
            break
        killed += 1
    assert killed == len({content for name in "bcd" for content in files(deltas[name]).values()}) + 1
    assert store.collect()[0] == 0
    for path in folder.rglob(".*.tmp"):
        os.utime(path, (0, 0))
    assert store.collect(0)[0] > killed  # what was sent in vain
    assert not list(folder.rglob(".*.tmp"))
    (tmp_path / "at the end").mkdir()
    store.pull("math", tmp_path / "at the end/delta")
    assert len(Artifact(tmp_path / "at the end/delta").chain) == 3


def test_killed_pulls(deltas: Deltas, folder: Path, tmp_path: Path) -> None:
    """Killed at each file: nothing is there that cannot be opened, and the next run fetches what is left."""
    Store(str(folder)).push(deltas["d"], "math")
    out, fetched = tmp_path / "out", tmp_path / "fetched"
    wanted = sum(len(files(deltas[name])) for name in "bcd")
    for _ in range(wanted + 1):

        def pull() -> None:
            fetch = Store.fetch

            def note(self: Store, content: Any, path: Path, arrived: Any) -> None:
                fetch(self, content, path, arrived)
                with fetched.open("a") as file:
                    file.write(f"{path.parent} {path.name}\n")
                (path.parent / ".half.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

            Store.fetch = note  # type: ignore[method-assign]
            Store(str(folder)).pull("math", out)

        code = in_a_process(pull)
        for name in ("b", "c", "out"):
            if (tmp_path / name).exists():
                Artifact(tmp_path / name)
        if code == 0:
            break
    assert code == 0 and len(fetched.read_text().splitlines()) == len(set(fetched.read_text().splitlines())) == wanted
    assert files(out) == files(deltas["d"]) and not work_folder(out).exists()
    assert not list(tmp_path.rglob(".*"))


def test_pushes_at_once(deltas: Deltas, folder: Path, tmp_path: Path) -> None:
    """Processes push to a place where there is no store yet: none of the versions is lost, all are whole."""
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(8)

    def push(name: str) -> None:
        begin.wait(30)
        Store(str(folder)).push(deltas[name], "math")

    processes = [context.Process(target=push, args=(name,)) for name in "abcdabcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    store = Store(str(folder))
    versions = store.look().versions("math")
    assert len(versions) == 4
    store.collect(0)
    for number, version in enumerate(versions):
        (tmp_path / str(number)).mkdir()
        store.pull(str(version), tmp_path / str(number) / "delta")
        Artifact(tmp_path / str(number) / "delta").check_digests()


def test_threads_that_push_to_memory(deltas: Deltas) -> None:
    pushes = [(deltas[name], name * (1 + i % 2)) for i, name in enumerate("abcdabcd")]
    threads = [threading.Thread(target=Store("memory://at/once").push, args=push) for push in pushes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Store("memory://at/once").look().pushes) == sorted(
        {name * (1 + i % 2) for i, name in enumerate("abcdabcd")}
    )
    forget()


def test_a_push_that_counts_on_a_version_that_is_removed_meanwhile(
    address: str, deltas: Deltas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`d` on `c` is pushed while the versions that have the files of `c` and `b` go, and are collected."""
    store = Store(address)
    version, _ = store.push(deltas["c"], "before")
    monkeypatch.setattr(module, "now", lambda: earlier(-HOURS))  # a day later: contents are old
    write = Place.write

    def late(self: Place, name: str, content: bytes) -> None:
        if name.startswith("deltas/math"):
            store.remove(str(version))
            assert store.collect()[0] == 0
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", late)
        store.push(deltas["d"], "math")
    assert list(store.look().pushes) == ["math"]
    store.pull("math", tmp_path / "delta")
    assert len(Artifact(tmp_path / "delta").chain) == 3


def test_a_clock_that_goes_ahead(folder: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pushed after a push is newer, whatever the clocks of the machines say."""
    store = Store(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(module, "now", lambda: earlier(-5))
        store.push(deltas["a"], "math")
        store.tag("math", "stable")
    second, _ = store.push(deltas["b"], "math")
    store.tag("math", "stable")
    listing = store.look()
    assert listing.find("math") == second and listing.tags["math"] == {"stable": second.version}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.sampled_from("abcd"), st.sampled_from("xy")),
            st.tuples(st.just("tag"), st.sampled_from("xy"), st.sampled_from(["stable", "old"])),
            st.tuples(st.just("remove"), st.sampled_from("xy"), st.sampled_from(["stable", "old", "newest"])),
            st.tuples(st.just("collect"), st.just(""), st.just("")),
        ),
        max_size=12,
    )
)
def test_any_commands_in_any_order(deltas: Deltas, steps: list[tuple[str, str, str]]) -> None:
    """A store is what a list of pushes and a dictionary of tags would be; what it says is there, and whole."""
    forget()
    store = Store("memory://model")
    store.push(deltas["a"], "x")
    versions = {name: Store("memory://other").push(deltas[name], "v")[0].version for name in "abcd"}
    pushes: dict[str, list[str]] = {"x": [versions["a"]], "y": []}
    tags: dict[tuple[str, str], str] = {}
    for kind, one, two in steps:
        if kind == "push":
            store.push(deltas[one], two)
            if pushes[two][-1:] != [versions[one]]:
                pushes[two].append(versions[one])
        elif kind == "tag" and pushes[one]:
            store.tag(one, two)
            tags[one, two] = pushes[one][-1]
        elif kind == "remove" and two == "newest" and pushes[one]:
            newest = pushes[one][-1]
            if newest in [version for (name, _), version in tags.items() if name == one]:
                with pytest.raises(DeltacomeError, match="has the tag"):
                    store.remove(f"{one}:{newest}")
            else:
                store.remove(f"{one}:{newest}")
                pushes[one] = [version for version in pushes[one] if version != newest]
        elif kind == "remove" and (one, two) in tags:
            store.remove(f"{one}:{two}")
            del tags[one, two]
        elif kind == "collect":
            store.collect(0)
    listing = store.look()
    for name, own in pushes.items():
        assert [version.version for version in listing.versions(name)] == list(dict.fromkeys(reversed(own)))
        assert listing.tags.get(name, {}) == {tag: version for (owner, tag), version in tags.items() if owner == name}
    store.collect(0)
    there = {name for name in held("memory://model") if name.startswith(CONTENTS)}
    everything = store.entries(version for own in listing.pushes.values() for version in own)
    assert there == {
        content.path for entry in everything if isinstance(entry, Entry) for content in entry.contents.values()
    }
    assert not [entry for entry in everything if not isinstance(entry, Entry)]
