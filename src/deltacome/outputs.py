"""Outputs that appear only when complete, and the hidden folders beside them where they are made.

A run that is killed, or that fails, leaves its work folder behind; the same command started again goes on from it.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltacome.errors import BadInputError, DeltacomeError
from deltacome.files import disk_errors, sync, write_atomically

LOCK, JOB, DONE = "lock", "job.json", "done"  # files of a work folder that are none of the work


def work_folder(out: Path) -> Path:
    """Where an output is made."""
    return out.absolute().with_name(f".{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise DeltacomeError where a folder or file of that name exists, or its parent folder does not."""
    if out.exists() or out.is_symlink():
        if (work_folder(out) / DONE).exists():  # left by a kill after the last step
            shutil.rmtree(work_folder(out), ignore_errors=True)
        raise DeltacomeError(f"{out} exists already; remove it or choose another name")
    if not out.absolute().parent.is_dir():
        raise DeltacomeError(f"cannot write {out}: there is no folder {out.parent}; create it first")


class WorkFolder:
    """The folder where an output is made, by one process at a time.

    Args:
        out: the output.
        job: everything that the work depends on. What another job has left is cleared away; all is, without a job.

    Raises:
        DeltacomeError: if another process is making the same output.
    """

    def __init__(self, out: Path, job: Mapping[str, Any] | None = None) -> None:
        self.out, self.path = out, work_folder(out)
        self._lock = _lock(out, self.path / LOCK)
        try:
            self._take_up(json.dumps(job, sort_keys=True).encode() if job is not None else None)
        except BaseException:
            self.close()
            raise

    def _take_up(self, job: bytes | None) -> None:
        description = self.path / JOB
        if job is None or not description.is_file() or description.read_bytes() != job:
            for path in self.path.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if job is not None and not description.is_file():
            write_atomically(description, job)

    def publish(self, folder: Path) -> None:
        """Flush a finished folder to disk and give it the output's name, in one step."""
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        refuse_existing(self.out)
        (self.path / DONE).touch()
        folder.rename(self.out)
        sync(self.out.absolute().parent)

    @contextmanager
    def until_over(self) -> Iterator[None]:
        """Let go of the folder when the block ends, which removes it after a good end and after bad input.

        After anything else it stays for another run.
        """
        is_over = False
        try:
            yield
            is_over = True
        except BadInputError:
            is_over = True
            raise
        finally:
            self.close(remove=is_over)

    def close(self, remove: bool = False) -> None:
        """Let go of the folder, for another run to go on from unless it is empty, or to be removed.

        Where the output is there, which may be another process's, nothing is left to go on to.
        """
        if remove or self.out.exists() or all(path.name in (LOCK, JOB, DONE) for path in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextmanager
def new_folder(out: Path, job: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder, in the work folder, that gets the name `out` when the block ends well.

    job: as `WorkFolder` has it. With one, what the block has finished (`files.new_file`) stays when it ends otherwise,
    and is there again in the next run of the same job; without, nothing stays.
    """
    refuse_existing(out)
    with disk_errors(f"write {out}"):
        work = WorkFolder(out, job)
        folder = work.path / "output"
        is_over = job is None
        try:
            folder.mkdir(exist_ok=True)
            for path in folder.glob(".*.tmp"):  # half a file
                path.unlink()
            yield folder
            work.publish(folder)
            is_over = True
        finally:
            if not any(folder.glob("[!.]*")):
                shutil.rmtree(folder, ignore_errors=True)
            work.close(remove=is_over)


def _lock(out: Path, path: Path) -> int:
    """A descriptor that holds the lock on a file in a folder; both are made if they are not there."""
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its holder has removed the folder meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(descriptor)
            raise DeltacomeError(f"another process is writing {out}; wait for it or choose another name") from error
        os.close(descriptor)
