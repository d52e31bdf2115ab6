"""Finished work outlives whatever ends a run early, and the same call goes on from it."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from conftest import Save, files, fine_tune, make_model
from deltacome import DeltacomeError, compress, export, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.executors import LocalExecutor
from deltacome.compression.matrices import Matrices
from deltacome.files import check_writable
from deltacome.outputs import DONE, WorkFolder, new_folder, refuse_existing, work_folder

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def whole(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole") / "delta"
    compress(base, finetuned, out, ratio=4)
    return out


def failing(function: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """A function that raises when it is called for that time."""
    calls = iter(range(at))

    def do(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return function(*arguments, **options)

    return do


def finished(out: Path) -> int:
    return len(list(work_folder(out).glob("*.safetensors")))


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("write_safetensors", FULL),
        ("shutil.copyfile", FileNotFoundError(2, "No such file", "tokenizer.json")),
        ("write_manifest", FULL),
        ("Artifact", DeltacomeError("a check that fails")),
        ("model_card", MemoryError()),
        ("model_card", KeyboardInterrupt()),
    ],
)
def test_a_failure_after_the_last_weight_loses_none(
    step: str, error: BaseException, base: Path, finetuned: Path, whole: Path, tmp_path: Path
) -> None:
    changed = tmp_path / finetuned.name  # with a file that is copied
    shutil.copytree(finetuned, changed)
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises((DeltacomeError, type(error))):
        patch.setattr(f"deltacome.compression.writing.{step}", failing(lambda *_: None, 0, error))
        compress(base, changed, tmp_path / "out", ratio=4)
    assert not (tmp_path / "out").exists() and finished(tmp_path / "out") == 20
    said: list[str] = []
    compress(base, changed, tmp_path / "out", ratio=4, warn=said.append)
    assert said == ["going on with the interrupted run: 20 of 20 weights are done"]
    weights = [(folder / "delta.safetensors").read_bytes() for folder in (tmp_path / "out", whole)]
    assert weights[0] == weights[1] and not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"method": "bitdelta"}, {"precision": "8:20"}])
def test_a_ratio_missed_in_the_end_loses_nothing(
    options: dict[str, Any], base: Path, finetuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeltacomeError, match=r"everything counted.*without --ratio the same command goes on"):
        compress(base, finetuned, tmp_path / "out", ratio=16, **options)
    said: list[str] = []
    compress(base, finetuned, tmp_path / "out", warn=said.append, **options)
    assert said == ["going on with the interrupted run: 20 of 20 weights are done"]


def test_a_ratio_beyond_reach_is_refused_before_the_work(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalExecutor, "each", None)
    with pytest.raises(DeltacomeError, match="cannot be reached: what is stored exactly"):
        compress(base, finetuned, tmp_path / "out", ratio=1000)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_travel_are_refused_before_the_work(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "sidecars", lambda self: [self.folder / "tokenizer copy.json"])
    with pytest.raises(DeltacomeError, match=r"tokenizer copy\.json cannot be in an artifact.*rename or remove it"):
        compress(base, finetuned, tmp_path / "out", ratio=4)
    monkeypatch.setattr(Checkpoint, "sidecars", lambda self: [self.folder / "gone.json"])
    with pytest.raises(DeltacomeError, match=r"gone\.json cannot be read: No such file"):
        compress(base, finetuned, tmp_path / "out", ratio=4)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_changes_meanwhile_is_no_artifact(base: Path, finetuned: Path, tmp_path: Path) -> None:
    shutil.copytree(finetuned, tmp_path / "copy")
    weights = tmp_path / "copy/model.safetensors"

    def touch(*arguments: Any) -> Any:
        os.utime(weights, ns=(0, 0))
        return checked(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeltacomeError, match="has changed meanwhile"):
        from deltacome.compression import pipeline

        checked = pipeline._check_outcome
        patch.setattr(pipeline, "_check_outcome", touch)
        compress(base, tmp_path / "copy", tmp_path / "out", ratio=4)
    assert not (tmp_path / "out").exists()


def interrupted(base: Path, finetuned: Path, out: Path, at: int, error: BaseException | None = None) -> None:
    """A compression that ends early in its n-th matrix."""
    error = error or KeyboardInterrupt()
    with pytest.MonkeyPatch.context() as patch, pytest.raises((DeltacomeError, type(error))):
        patch.setattr(Matrices, "compress", failing(Matrices.compress, at, error))
        compress(base, finetuned, out, ratio=4)


def test_torn_rows_of_the_journal_are_done_again(base: Path, finetuned: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    interrupted(base, finetuned, out, 9)
    rows = sorted(work_folder(out).glob("*.safetensors"))
    assert len(rows) == 5 + 9  # the norms, and nine matrices
    content = [row.read_bytes() for row in rows[:6]]
    rows[0].write_bytes(content[0][:-1])
    rows[1].write_bytes(b"")
    rows[2].write_bytes(b"\0" * len(content[2]))
    rows[3].write_bytes(content[4])  # another weight's
    rows[4].write_bytes(content[4][:20] + b"\0" * (len(content[4]) - 20))
    rows[5].write_bytes((2).to_bytes(8, "little") + b"{}")
    for path in work_folder(out).glob("*.intermediate"):
        path.write_bytes(path.read_bytes()[:-1])
    (work_folder(out) / "0.123.partial").write_bytes(b"half a row")
    said: list[str] = []
    compress(base, finetuned, out, ratio=4, warn=said.append)
    assert said == ["going on with the interrupted run: 8 of 20 weights are done"]
    assert files(out) == files(whole)


def test_a_row_counts_when_it_is_on_disk(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Path]] = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        events.append(("rename", target))
        return rename(path, target)

    monkeypatch.setattr("deltacome.compression.journal.sync", lambda path: events.append(("sync", path)))
    monkeypatch.setattr(Path, "rename", renamed)
    interrupted(base, finetuned, tmp_path / "out", 2)
    for place, (event, path) in enumerate(events):
        if event == "rename":
            (before, file), (after, folder) = events[place - 1], events[place + 1]
            assert before == after == "sync" and file.suffix == ".partial" and folder == path.parent
    assert len([event for event, _ in events if event == "rename"]) > 20


@pytest.mark.parametrize("error", [FULL, DeltacomeError("Ray gave up"), MemoryError()])
def test_what_ends_a_run_early_loses_nothing(
    error: BaseException, base: Path, finetuned: Path, whole: Path, tmp_path: Path
) -> None:
    interrupted(base, finetuned, tmp_path / "out", 3, error)
    assert finished(tmp_path / "out") == 5 + 3
    compress(base, finetuned, tmp_path / "out", ratio=4)
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), FULL])
def test_no_memory_is_not_taken_for_a_model_that_cannot_be_measured(
    error: Exception, base: Path, finetuned: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises((DeltacomeError, type(error))):
        patch.setattr("deltacome.compression.measuring.CalibrationStream", failing(lambda *_: None, 0, error))
        compress(base, finetuned, tmp_path / "out", ratio=4)
    compress(base, finetuned, tmp_path / "out", ratio=4)
    assert files(tmp_path / "out") == files(whole)


def test_a_model_that_cannot_be_measured_is_said_again_when_going_on(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = failing(lambda *_: None, 0, DeltacomeError("cannot be built"))
    monkeypatch.setattr("deltacome.compression.measuring.CalibrationStream", unfit)
    interrupted(base, finetuned, tmp_path / "out", 3)
    said: list[str] = []
    compress(base, finetuned, tmp_path / "out", ratio=4, warn=said.append)
    assert len(said) == 2 and "could not be measured" in said[1]


# Merging and exporting.


@pytest.fixture
def in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacome.restore.merging.SHARD_BYTES", 30_000)


@pytest.mark.usefixtures("in_shards")
@pytest.mark.parametrize("step", ["write_safetensors", "copy_sidecars"])
def test_merging_goes_on(step: str, base: Path, whole: Path, tmp_path: Path) -> None:
    from deltacome.restore import merging

    merge(base, whole, tmp_path / "once")
    count = len(list((tmp_path / "once").glob("*.safetensors")))
    assert count >= 4
    at = 2 if step == "write_safetensors" else 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeltacomeError, match="the disk is full"):
        patch.setattr(merging, step, failing(getattr(merging, step), at, FULL))
        merge(base, whole, tmp_path / "out")
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        write = merging.write_safetensors
        patch.setattr(merging, "write_safetensors", lambda path, *rest: (written.append(path.name), write(path, *rest)))
        merge(base, whole, tmp_path / "out")
    assert len(written) == (count - 2 if step == "write_safetensors" else 0)
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out"]


def test_exporting_goes_on(base: Path, whole: Path, tmp_path: Path) -> None:
    from deltacome.restore import exporting

    report = export(base, whole, tmp_path / "once", max_rank=3)
    adapter = exporting._adapter
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, "_adapter", failing(adapter, 4, KeyboardInterrupt()))
        export(base, whole, tmp_path / "out", max_rank=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeltacomeError, match="the disk is full"):
        patch.setattr(exporting, "_adapter", failing(adapter, 15 - 4, AssertionError("too often")))
        patch.setattr(exporting, "write_safetensors", failing(adapter, 0, FULL))
        export(base, whole, tmp_path / "out", max_rank=3)
    assert export(base, whole, tmp_path / "out", max_rank=3) == {**report, "folder": str(tmp_path / "out")}
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out"]


def test_bad_input_leaves_nothing(base: Path, finetuned: Path, whole: Path, tmp_path: Path) -> None:
    for make in (merge, export):
        with pytest.raises(DeltacomeError, match="is not the base of"):
            make(finetuned, whole, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The work folder.


def test_two_writers(base: Path, finetuned: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work_folder(out).mkdir()
    calls: list[Callable[[], Any]] = [
        lambda: compress(base, finetuned, out),
        lambda: merge(base, whole, out),
        lambda: export(base, whole, out),
        lambda: new_folder(out).__enter__(),
    ]
    with FileLock(work_folder(out) / "lock"):
        for call in calls:
            with pytest.raises(DeltacomeError, match=r"another process is writing .*; wait for it or choose another"):
                call()


def test_a_lock_that_is_removed_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one before ends: the new one must not hold a lock that nobody else sees."""
    flock, calls = fcntl.flock, []

    def removed_first(descriptor: int, flags: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(work_folder(tmp_path / "out"))
        flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    work = WorkFolder(tmp_path / "out")
    with pytest.raises(DeltacomeError, match="another process"):
        WorkFolder(tmp_path / "out")
    work.close()
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_what_a_kill_left_is_no_obstacle(tmp_path: Path) -> None:
    left = work_folder(tmp_path / "out") / "output"
    left.mkdir(parents=True)
    (left / "old").write_text("old")
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()  # of the same process id
    with new_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
        (folder / "new").write_text("new")
    assert files(tmp_path / "out") == {"new": b"new"}


def test_what_a_kill_after_the_last_step_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    work_folder(tmp_path / "out").mkdir()
    for is_done in (False, True):
        if is_done:
            (work_folder(tmp_path / "out") / DONE).touch()
        with pytest.raises(DeltacomeError, match="exists already"):
            refuse_existing(tmp_path / "out")
        assert work_folder(tmp_path / "out").exists() != is_done


def test_an_output_that_cannot_be_written_is_one_sentence(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "touch", mkdir)
    with pytest.raises(DeltacomeError, match=r"cannot write .*out: Read-only file system \(.*\.out\.partial\)"):
        merge(base, whole, tmp_path / "out")
    with pytest.raises(DeltacomeError, match="Read-only file system"):
        check_writable(tmp_path / "file.json")
    with pytest.raises(DeltacomeError, match="it is a folder"):
        check_writable(tmp_path)


# Ctrl-C.


@pytest.fixture
def process(save: Save, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A compression of many layers, which is not over before somebody looks at it on a busy machine."""
    model = make_model(num_hidden_layers=30)
    base = save(model, "base")
    fine_tune(model)
    finetuned = save(model, "finetuned")
    command = [
        sys.executable,
        "-m",
        "deltacome.cli",
        "compress",
        str(base),
        str(finetuned),
        "-o",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def catches_signals(process: subprocess.Popen[str]) -> bool:
    """Whether the command line has its handlers in place, of which Python has none for SIGTERM by itself."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("sent", "importing"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_an_interruption_is_one_sentence(
    sent: signal.Signals, importing: bool, process: subprocess.Popen[str], tmp_path: Path
) -> None:
    """While torch is being imported, and in the work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if catches_signals(process) if importing else work_folder(tmp_path / "out").exists():
            break
        time.sleep(0.005)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent and out == ""
    assert "Traceback" not in err and err.endswith("interrupted; the same command goes on where it stopped\n"), err


def test_work_on_an_output_that_another_process_has_made_is_cleared_away(tmp_path: Path) -> None:
    """It looked for the output before the other had finished, and began when that had let go of the folder."""
    out = tmp_path / "out"
    with pytest.raises(DeltacomeError, match="exists already"), new_folder(out, {"a": 1}) as folder:
        (folder / "weights").write_text("ours")
        out.mkdir()
    assert list(tmp_path.iterdir()) == [out] and not any(out.iterdir())
