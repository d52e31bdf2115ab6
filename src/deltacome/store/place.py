"""Where a store lies: a folder, or an address of fsspec such as s3://bucket/deltas; flat folders of files."""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from deltacome.errors import DeltacomeError, reason
from deltacome.files import sync

CHUNK = 2**22  # bytes that are read at a time
MOST_BYTES = 2**24  # of a file that is read in one go


class Place:
    """Files by their names, which are `FOLDER/FILE`, or `FILE` for those at the top.

    `folder` is the local folder, None where the place is none.

    Raises:
        DeltacomeError: from everything, whatever the storage raises.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._files, self._root = url_to_fs(address)
        except ImportError as error:
            raise DeltacomeError(
                f"{address} needs a package that is not installed here ({reason(error)}); install that"
            ) from error
        except Exception as error:
            raise DeltacomeError(f"{address} is no folder and no address that fsspec knows: {reason(error)}") from error
        self.folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    @contextmanager
    def _answers(self, action: str, foreseen: type[Exception] = DeltacomeError) -> Iterator[None]:
        try:
            yield
        except (DeltacomeError, MemoryError, foreseen):
            raise
        except Exception as error:  # of whatever library the storage is reached by
            raise DeltacomeError(f"the store {self.address} cannot {action}: {reason(error)}") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _local(self, name: str) -> Path:
        assert self.folder is not None
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def make(self, folders: list[str]) -> None:
        """Make the place and folders in it, where the storage has such; what it lies in must be there."""
        with self._answers("be made; what it is to lie in must be there"):
            for name in ["", *folders]:
                with suppress(FileExistsError):
                    self._files.mkdir(self._path(name).rstrip("/"), create_parents=False)

    def list(self, folder: str = "") -> list[str]:
        """The names of what lies in a folder, without the folder's; hidden ones are left out."""
        with self._answers("be listed"):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(folder).rstrip("/") or "/", detail=False)
            except FileNotFoundError:  # object stores have no empty folders
                return []
        own = self._path(folder).strip("/")  # which some object stores list as well
        names = (path.rstrip("/").rpartition("/")[2] for path in found if path.strip("/") != own)
        return sorted(name for name in names if name and not name.startswith("."))

    def read(self, name: str) -> bytes:
        """A small file; of a large one the beginning.

        Raises:
            FileNotFoundError: if there is none.
        """
        with self._answers(f"give {name}", FileNotFoundError):
            found: bytes = self._files.cat_file(self._path(name), start=0, end=MOST_BYTES)
            return found

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, which is there whole or not at all."""
        with self._answers(f"take {name}"):
            if self.folder is None:
                self._files.pipe_file(self._path(name), content)
                return
            path = self._local(name)
            temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
            try:
                temporary.write_bytes(content)
                sync(temporary)
                temporary.replace(path)
                sync(path.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file to here; half of one may be seen meanwhile."""
        with self._answers(f"take {name}"):
            if self.folder is None:
                self._files.put_file(str(path), self._path(name))
                return
            shutil.copyfile(path, self._local(name))
            sync(self._local(name))

    def download(self, name: str, file: BinaryIO, most: int, arrived: Callable[[int], None]) -> None:
        """Copy a file from here, up to so many bytes and a chunk more. arrived: told of the bytes of each chunk.

        Raises:
            FileNotFoundError: if there is none.
        """
        with self._answers(f"give {name}", FileNotFoundError), self._files.open(self._path(name), "rb") as source:
            while file.tell() <= most and (chunk := source.read(CHUNK)):
                file.write(chunk)
                arrived(len(chunk))

    def remove(self, name: str) -> None:
        """Remove a file, unless it is gone."""
        with self._answers(f"remove {name}"), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))
