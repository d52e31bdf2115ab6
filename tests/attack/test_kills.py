"""Runs that are killed, told to stop, without room or beside another, at any moment; `make attack` does many of each.

Each is a process of its own, forked from one that has imported everything, so that the moments are all of the work.
"""

import os
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import pytest

from commands import start
from conftest import files
from deltacome.outputs import work_folder

LONGEST_LOG = 4096  # bytes of what a command says, into a file that has no more room than its others
SENTENCE = "interrupted; the same command goes on where it stopped"


def _prepare(largest_file: int | None) -> None:
    """largest_file: bytes; a longer one fails as on a full disk."""
    from deltacome.restore import merging

    merging.SHARD_BYTES = 30_000
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


@dataclass
class Job:
    """A command with an output, in a folder of its own, and what an uninterrupted run of it leaves."""

    arguments: list[str]
    folder: Path
    seconds: float = 0.0
    expected: dict[str, bytes] | None = None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def said(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""

    def start(self, log: str = "log", largest_file: int | None = None) -> BaseProcess:
        (self.folder / log).unlink(missing_ok=True)
        return start(self.folder / log, *self.arguments, "-o", self.out, prepare=partial(_prepare, largest_file))

    def run(self, largest_file: int | None = None) -> int | None:
        """The exit status."""
        process = self.start(largest_file=largest_file)
        process.join(120)
        return process.exitcode

    def finish(self) -> None:
        """Run it to its end, and see that what it leaves is right, and all that it leaves."""
        status = self.run()
        assert status == 0 or (status == 1 and "exists already" in self.said and self.expected), self.said
        if self.expected is None:
            self.expected = files(self.out)
        assert files(self.out) == self.expected
        assert {path.name for path in self.folder.iterdir()} <= {"out", "log", "log2"}
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()


@pytest.fixture(scope="module")
def jobs(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    whole = tmp_path_factory.mktemp("whole") / "delta"
    made = Job(["compress", str(base), str(finetuned), "--ratio", "4"], tmp_path_factory.mktemp("compress"))
    assert made.run() == 0, made.said
    made.out.rename(whole)
    found = [made]
    found += [Job([kind, str(base), str(whole)], tmp_path_factory.mktemp(kind)) for kind in ("merge", "export")]
    for job in found:
        job.finish()
        started = time.monotonic()
        job.finish()
        job.seconds = time.monotonic() - started
    yield {job.arguments[0]: job for job in found}


EACH = pytest.mark.parametrize("kind", ["compress", "merge", "export"])
IS_LONG = pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.attack)])


@EACH
@IS_LONG
def test_killed_at_any_moment(count: int, kind: str, jobs: dict[str, Job], capsys: pytest.CaptureFixture[str]) -> None:
    """The resumed output is the uninterrupted one's, byte for byte."""
    random = Random(count)
    job = jobs[kind]
    kills = resumed = finished = 0
    while kills < count:
        process = job.start()
        process.join(random.uniform(0.01, 1.1 * job.seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            resumed += work_folder(job.out).exists()
            assert not job.out.exists() or files(job.out) == job.expected
        if process.exitcode == 0 or job.out.exists() or random.random() < 0.4:
            job.finish()
            finished += 1
    job.finish()
    if count >= 100:
        with capsys.disabled():
            print(f"\n{job.arguments[0]}: {kills} kills, {resumed} with work to go on from, {finished + 1} finished")


@EACH
@IS_LONG
def test_told_to_stop_at_any_moment(
    count: int, kind: str, jobs: dict[str, Job], capsys: pytest.CaptureFixture[str]
) -> None:
    random = Random(count)
    job = jobs[kind]
    stopped = 0
    while stopped < count:
        process = job.start()
        process.join(random.uniform(0.05, job.seconds))
        sent = random.choice([signal.SIGINT, signal.SIGTERM])
        if process.is_alive() and process.pid:
            os.kill(process.pid, sent)
        process.join(60)
        assert "Traceback" not in job.said, job.said
        if process.exitcode == 128 + sent:
            assert job.said.strip().splitlines()[-1] == SENTENCE
        else:  # after its end, or before it has begun, when all is the fork's
            assert process.exitcode in (0, -sent) or not job.said, job.said
        stopped += 1
        if job.out.exists() or random.random() < 0.4:
            job.finish()
    job.finish()
    if count >= 100:
        with capsys.disabled():
            print(f"\n{job.arguments[0]}: told to stop {stopped} times")


@EACH
@IS_LONG
def test_no_room_at_any_moment(count: int, kind: str, jobs: dict[str, Job]) -> None:
    """Files beyond some size fail: one sentence, and the same command goes on when there is room."""
    random = Random(count)
    job = jobs[kind]
    assert job.expected is not None
    largest = max(map(len, job.expected.values()))
    for _ in range(count):
        room = LONGEST_LOG + int((largest - LONGEST_LOG) * random.random() ** 2)
        assert job.run(largest_file=room) == 1
        errors = [line for line in job.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "cannot write" in errors[0] and "Traceback" not in job.said, job.said
        assert not job.out.exists()
        if random.random() < 0.4:
            job.finish()
    job.finish()


@EACH
@IS_LONG
def test_two_writers_at_once(count: int, kind: str, jobs: dict[str, Job]) -> None:
    """One of them makes the output, and the other says why it does not."""
    random = Random(count)
    job = jobs[kind]
    for _ in range(count):
        one = job.start()
        time.sleep(random.uniform(0, job.seconds))
        other = job.start("log2")
        one.join(120)
        other.join(120)
        log, log2 = ((job.folder / name).read_text() for name in ("log", "log2"))
        assert sorted([one.exitcode, other.exitcode]) == [0, 1], log + log2  # type: ignore[type-var]
        loser = log if one.exitcode else log2
        assert "another process is writing" in loser or "exists already" in loser
        job.finish()


@EACH
@pytest.mark.parametrize("place", ["/sys/out", "/proc/out"])
def test_where_nothing_can_be_written(place: str, kind: str, jobs: dict[str, Job]) -> None:
    job = jobs[kind]
    process = start(job.folder / "log", *job.arguments, "-o", place)
    process.join(120)
    assert process.exitcode == 1
    assert [line for line in job.said.splitlines() if f"error: cannot write {place}: " in line] and (
        "Traceback" not in job.said
    )
