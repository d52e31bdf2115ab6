"""What a store says of a version of a delta: its files, those of the deltas that it is made on, and where each lies."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.format.entries import compact
from deltacome.format.lineage import MOST_PARENTS
from deltacome.format.manifest import MANIFEST, is_parent_name, plain_file_name

CONTENTS = "contents"
DIGITS = 12  # of a version
_CONTENT = re.compile(rf"{CONTENTS}/[0-9a-f]{{64}}-[0-9TZ.]{{20,30}}-[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Content:
    """A file. size: in bytes. path: in the store."""

    sha256: str
    size: int
    path: str


@dataclass(frozen=True)
class Entry:
    """A version of a delta: `folders` are its files by their names, its parent's, that one's parent's, and so on.

    names: of the folders, as each parent's child names it; the first is "". base, fingerprint: of the base. size: bytes
    of weights and manifests. full_bytes: of the fine-tuned weights in 16 bit.
    """

    names: tuple[str, ...]
    folders: tuple[Mapping[str, Content], ...]
    base: str
    fingerprint: str
    size: int
    full_bytes: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files."""
        files = [{name: folder[name].sha256 for name in sorted(folder)} for folder in self.folders]
        return hashlib.sha256(compact([self.names, files])).hexdigest()

    @property
    def version(self) -> str:
        return self.digest[:DIGITS]

    @property
    def contents(self) -> dict[str, Content]:
        """What the files have in them, by SHA-256."""
        return {content.sha256: content for folder in self.folders for content in folder.values()}

    def to_json(self) -> bytes:
        """As a store has it."""
        folders = [{name: vars(content) for name, content in folder.items()} for folder in self.folders]
        return compact({**vars(self), "folders": folders, "digest": self.digest}) + b"\n"

    @staticmethod
    def parse(text: bytes, version: str) -> "Entry":
        """The entry of a version.

        Raises:
            DeltacomeError: if it is not what was written.
        """
        try:
            fields = json.loads(text)
            digest = fields.pop("digest")
            names = tuple(fields.pop("names"))
            folders = tuple(
                {plain_file_name(name): _content(**content) for name, content in folder.items()}
                for folder in fields.pop("folders")
            )
            entry = Entry(names, folders, **fields)
            _check(entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeltacomeError(f"its entry is damaged ({error})") from error
        if entry.digest != digest or entry.version != version:
            raise DeltacomeError("its entry is damaged (its digest differs)")
        return entry


def _content(sha256: Any, size: Any, path: Any) -> Content:
    if not isinstance(path, str) or not isinstance(size, int) or size < 0 or not _CONTENT.fullmatch(path):
        raise ValueError(f"content {path!r:.200}")
    if sha256 != path.removeprefix(f"{CONTENTS}/")[:64]:
        raise ValueError(f"the SHA-256 of {path}")
    return Content(sha256, size, path)


def _check(entry: Entry) -> None:
    texts, numbers = (entry.base, entry.fingerprint), (entry.size, entry.full_bytes)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("fields")
    parents = entry.names[1:]
    if not 1 <= len(entry.names) == len(entry.folders) <= MOST_PARENTS + 1 or entry.names[0] != "":
        raise ValueError("folders")
    if len(set(parents)) < len(parents) or not all(is_parent_name(name) and "/" not in name for name in parents):
        raise ValueError("names of folders")
    if not all(MANIFEST in folder for folder in entry.folders):
        raise ValueError(f"a folder without {MANIFEST}")
