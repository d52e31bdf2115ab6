"""A store of deltas: names, versions, tags. `docs/store.md` has the layout, and why nothing in it needs a lock.

No file is ever written a second time, and what names a file is written after it. What is newest, by the time in its
name, counts.
"""

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deltacome.errors import DeltacomeError
from deltacome.files import new_file, sha256
from deltacome.format.artifact import Artifact
from deltacome.format.entries import compact
from deltacome.format.manifest import MANIFEST, MODEL_CARD
from deltacome.outputs import new_folder, refuse_existing
from deltacome.progress import bar
from deltacome.store.entry import CONTENTS, DIGITS, Content, Entry
from deltacome.store.place import Place

MARKER, LAYOUT = "deltacome-store.json", 1
DELTAS, TAGS, REMOVED = "deltas", "tags", "removed"
FOLDERS = [CONTENTS, DELTAS, TAGS, REMOVED]
HOURS = 24.0  # that contents stay which nothing names any more; the longest push takes a quarter of it
READERS = 16  # entries read at once
_TIME = "%Y%m%dT%H%M%S.%fZ"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_VERSION = rf"[0-9a-f]{{{DIGITS}}}"
_STAMP = r"\d{8}T\d{6}\.\d{6}Z"
_DELTA_FILE = re.compile(rf"({_NAME})@({_STAMP})-({_VERSION})\.json")
_TAG_FILE = re.compile(rf"({_NAME})@({_NAME})@({_STAMP})-({_VERSION})")
_TIMED = re.compile(rf"(?:[0-9a-f]{{64}}-)?({_STAMP})-.*")  # of contents and of removed entries


def now() -> str:
    """The time as it is in names, which are in its order."""
    return datetime.now(UTC).strftime(_TIME)


def earlier(hours: float) -> str:
    """The time so long ago."""
    return (datetime.now(UTC) - timedelta(hours=hours)).strftime(_TIME)


def _after(last: str | None) -> str:
    """Now, or, where a clock that goes ahead of this one's has written `last`, right after that."""
    found = now()
    if last is None or found > last:
        return found
    return (datetime.strptime(last, _TIME) + timedelta(microseconds=1)).strftime(_TIME)


@dataclass(frozen=True)
class Version:
    """A version of the delta of a name. time: of its push."""

    name: str
    time: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def when(self) -> datetime:
        """`time`, in UTC."""
        return datetime.strptime(self.time, _TIME).replace(tzinfo=UTC)

    @property
    def path(self) -> str:
        return f"{DELTAS}/{self.name}@{self.time}-{self.version}.json"


@dataclass(frozen=True)
class Listing:
    """What there is at a time. pushes: by name, newest first, of which the same version may be several.

    tags: by name and tag, the version.
    """

    pushes: dict[str, list[Version]]
    tags: dict[str, dict[str, str]]

    def versions(self, name: str) -> list[Version]:
        """Those of a name, newest first."""
        found: dict[str, Version] = {}
        for push in self.pushes.get(name, []):
            found.setdefault(push.version, push)
        return list(found.values())

    def find(self, reference: str) -> Version:
        """The version that NAME, NAME:VERSION or NAME:TAG means.

        Raises:
            DeltacomeError: if there is none.
        """
        name, colon, which = reference.partition(":")
        versions = self.versions(name)
        if not versions:
            raise DeltacomeError(f"the store has no delta {name}")
        wanted = self.tags.get(name, {}).get(which, which) if colon else versions[0].version
        for version in versions:
            if version.version == wanted:
                return version
        raise DeltacomeError(f"the store has no version and no tag {which} of {name}")


class Store:
    """The store at an address, which is a folder or one of fsspec's.

    Raises:
        DeltacomeError: from everything, if the storage does not answer, or what it has is damaged.
    """

    def __init__(self, address: str) -> None:
        self.address, self.place = address, Place(address)

    def look(self) -> Listing:
        """What there is.

        Raises:
            DeltacomeError: if there is no store.
        """
        self._check_layout()
        pushes: dict[str, list[Version]] = {}
        for file in self.place.list(DELTAS):
            if found := _DELTA_FILE.fullmatch(file):
                pushes.setdefault(found[1], []).append(Version(found[1], found[2], found[3]))
        for versions in pushes.values():
            versions.sort(key=lambda version: version.time, reverse=True)
        tags: dict[str, dict[str, str]] = {}
        for name, tag, _, version in sorted(self._tag_files().values(), key=lambda fields: fields[2]):
            tags.setdefault(name, {})[tag] = version
        return Listing(pushes, tags)

    def _tag_files(self) -> dict[str, tuple[str, str, str, str]]:
        """Name, tag, time and version by the files that say so."""
        found = ((file, _TAG_FILE.fullmatch(file)) for file in self.place.list(TAGS))
        return {f"{TAGS}/{file}": (match[1], match[2], match[3], match[4]) for file, match in found if match}

    def _check_layout(self) -> None:
        try:
            marker = self.place.read(MARKER)
        except FileNotFoundError:
            raise DeltacomeError(f"there is no store at {self.address}; deltacome store push makes one") from None
        if marker != _marker():
            raise DeltacomeError(f"the store at {self.address} is of another layout; install the release that made it")

    def _make(self) -> None:
        """Make the store, if there is none and nothing else."""
        found = self.place.list()
        if MARKER in found:
            self._check_layout()
            return
        if set(found) - set(FOLDERS):  # which another first push may just have made
            raise DeltacomeError(f"{self.address} is no store, and it is not empty; name a place of its own")
        self.place.make(FOLDERS)
        self.place.write(MARKER, _marker())

    def entry(self, version: Version) -> Entry:
        """What a version consists of.

        Raises:
            DeltacomeError: if it is gone or damaged.
        """
        try:
            return Entry.parse(self.place.read(version.path), version.version)
        except FileNotFoundError as error:
            raise DeltacomeError(f"{version} is not in the store any more") from error
        except DeltacomeError as error:
            raise DeltacomeError(f"{version} in the store {self.address} cannot be used: {error}") from error

    def entries(self, versions: Iterable[Version]) -> list[Entry | DeltacomeError]:
        """What versions consist of, or why that cannot be said; several are read at once.

        The threads are none that the end of a process would wait for.
        """
        wanted = list(versions)
        found: list[Entry | DeltacomeError] = [DeltacomeError(f"{version} was not read") for version in wanted]
        numbers = iter(range(len(wanted)))

        def read() -> None:
            for number in numbers:
                try:
                    found[number] = self.entry(wanted[number])
                except DeltacomeError as error:
                    found[number] = error

        threads = [threading.Thread(target=read, daemon=True) for _ in range(min(READERS, len(wanted)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    # What changes it.

    def push(self, folder: Path, name: str) -> tuple[Version, int]:
        """Make a delta, with those that it is made on, the newest version under a name.

        Returns:
            The version, which is the same for the same files, and the bytes that had to be sent.

        Raises:
            DeltacomeError: if the folder is no whole delta, or the name none.
        """
        if not re.fullmatch(_NAME, name):
            raise DeltacomeError(f"{name!r} is no name in a store: letters, digits, dots, - and _, 96 at most")
        started, begin = now(), time.monotonic()
        artifact = Artifact(folder)
        artifact.check_digests()
        paths = _paths(artifact)
        digests = [{file: sha256(path) for file, path in own.items()} for own in paths]
        self._make()
        listing = self.look()
        versions = [version for pushes in listing.pushes.values() for version in pushes]
        found = zip(versions, self.entries(versions), strict=True)
        whole = {version: entry for version, entry in found if isinstance(entry, Entry)}
        known = {digest: content for entry in whole.values() for digest, content in entry.contents.items()}
        new: dict[str, Path] = {}
        for own, files in zip(paths, digests, strict=True):
            for file, digest in files.items():
                if digest not in known:
                    content = f"{CONTENTS}/{digest}-{started}-{secrets.token_hex(4)}"
                    known[digest], new[content] = Content(digest, own[file].stat().st_size, content), own[file]
        names = ["", *(each.manifest["parent"]["name"].rpartition("/")[2] for each in artifact.chain[:-1])]
        if len(set(names)) < len(names):
            raise DeltacomeError(f"two of the deltas that {folder} is made on have one name; flatten it first")
        entry = Entry(
            tuple(names),
            tuple({file: known[digest] for file, digest in files.items()} for files in digests),
            artifact.base_name,
            artifact.fingerprint,
            artifact.chain_bytes,
            artifact.finetuned_bytes,
        )
        pushes = listing.pushes.get(name, [])
        if pushes and pushes[0].version == entry.version and pushes[0] in whole:
            return pushes[0], 0
        sizes = {content: path.stat().st_size for content, path in new.items()}
        with bar(f"pushing {name}", sum(sizes.values())) as advance:
            for content, path in new.items():
                self.place.upload(path, content)
                advance(sizes[content])
        if time.monotonic() - begin > HOURS * 3600 / 4:
            raise DeltacomeError(f"pushing {name} took more than {HOURS / 4:g} hours, and its files may be gone; again")
        version = Version(name, _after(pushes[0].time if pushes else None), entry.version)
        self.place.write(version.path, entry.to_json())
        return version, sum(sizes.values())

    def tag(self, reference: str, tag: str) -> Version:
        """Let a tag of a name mean a version.

        Raises:
            DeltacomeError: if there is no such version, or the tag is none.
        """
        if not re.fullmatch(_NAME, tag) or re.fullmatch(_VERSION, tag):
            raise DeltacomeError(f"{tag!r} is no tag: letters, digits, dots, - and _, and not like a version")
        version = self.look().find(reference)
        before = {path: found for path, found in self._tag_files().items() if found[:2] == (version.name, tag)}
        stamp = _after(max((found[2] for found in before.values()), default=None))
        self.place.write(f"{TAGS}/{version.name}@{tag}@{stamp}-{version.version}", b"\n")
        for path in before:
            self.place.remove(path)
        return version

    def remove(self, reference: str) -> str:
        """Remove a version, or a tag. Contents go with `collect`, and not before a day has passed.

        Returns:
            What has been removed, in words.

        Raises:
            DeltacomeError: if there is no such version, or it has a tag.
        """
        name, _, which = reference.partition(":")
        listing = self.look()
        tags = listing.tags.get(name, {})
        if which in tags:
            for path, found in self._tag_files().items():
                if found[:2] == (name, which):
                    self.place.remove(path)
            return f"the tag {which} of {name}"
        if not which:
            raise DeltacomeError(f"which version of {name}? write {name}:VERSION or {name}:TAG")
        version = listing.find(reference)
        of_it = [tag for tag, target in tags.items() if target == version.version]
        if of_it:
            raise DeltacomeError(f"{version} has the tag {of_it[0]}; remove or move that first")
        for push in listing.pushes[name]:
            if push.version == version.version:
                # Who pushes now may count on its contents: they have to be known for a while.
                with suppress(FileNotFoundError):  # somebody else has removed it meanwhile
                    self.place.write(f"{REMOVED}/{now()}-{secrets.token_hex(4)}.json", self.place.read(push.path))
                self.place.remove(push.path)
        return f"{version}"

    def collect(self, hours: float = HOURS) -> tuple[int, int]:
        """Remove contents that no version has had for so many hours, and that are older than that.

        Returns:
            How many files were removed, and how many stay.

        Raises:
            DeltacomeError: if an entry cannot be read, for then nobody knows what is needed.
        """
        limit, stay = earlier(hours), set()
        contents = self.place.list(CONTENTS)
        # The living before the removed: one that is removed meanwhile is among one of them.
        for found in self.entries(version for pushes in self.look().pushes.values() for version in pushes):
            if isinstance(found, DeltacomeError):
                raise DeltacomeError(f"nothing was removed: {found}; remove that version")
            stay |= {content.path for content in found.contents.values()}
        old = []
        for file in self.place.list(REMOVED):
            if _is_older(file, limit):
                old.append(f"{REMOVED}/{file}")
            else:
                stay |= self._contents_of_removed(f"{REMOVED}/{file}")
        names = [f"{CONTENTS}/{file}" for file in contents]
        gone = [name for name in names if name not in stay and _is_older(name.rpartition("/")[2], limit)]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self.place.remove, [*gone, *old]))
        if self.place.folder is not None:
            for path in self.place.folder.glob("*/.*.tmp"):
                if path.stat().st_mtime < time.time() - hours * 3600:
                    path.unlink(missing_ok=True)
        return len(gone), len(names) - len(gone)

    def _contents_of_removed(self, path: str) -> set[str]:
        try:
            text = self.place.read(path)
        except FileNotFoundError:  # by another `collect`
            return set()
        return set(re.findall(rf"{CONTENTS}/[\w.-]+", text.decode("utf-8", "replace")))

    # What reads it.

    def fetch(self, content: Content, path: Path, arrived: Callable[[int], None]) -> None:
        """Copy a content to a local file, which is there once its digest is right.

        Args:
            arrived: told of the bytes of each part that comes.
        """
        try:
            with new_file(path) as file:
                self.place.download(content.path, file, content.size, arrived)
                file.flush()
                if sha256(Path(file.name)) != content.sha256:
                    raise DeltacomeError(
                        f"{content.path} in the store {self.address} is damaged (its SHA-256 differs); remove "
                        "the versions that have it, and push them again"
                    )
        except FileNotFoundError as error:
            raise DeltacomeError(f"{content.path} is not in the store {self.address} any more") from error

    def pull(self, reference: str, out: Path) -> Version:
        """Copy a version to a folder; the deltas that it is made on go beside that, unless they are there.

        Killed and started again, it goes on with the next file.

        Raises:
            DeltacomeError: if there is no such version, it is damaged, or something else is in the place of the output.
        """
        refuse_existing(out)
        version = self.look().find(reference)
        entry = self.entry(version)
        wanted = [(out, entry.folders[0])]
        for name, files in zip(entry.names[1:], entry.folders[1:], strict=True):
            folder = out.absolute().parent / name
            if name == out.name:
                raise DeltacomeError(
                    f"{version} is made on a delta called {name}, which goes beside it; take another name"
                )
            if not (folder / MANIFEST).is_file():
                refuse_existing(folder)
                wanted.append((folder, files))
            elif sha256(folder / MANIFEST) != files[MANIFEST].sha256:
                raise DeltacomeError(
                    f"{version} is made on a delta called {name}, and {folder} is another; pull it into another folder"
                )
        with bar(f"pulling {version}", sum(file.size for _, files in wanted for file in files.values())) as advance:
            for target, files in reversed(wanted):  # parents first: what is there can be opened
                with new_folder(target, {name: content.sha256 for name, content in files.items()}) as folder:
                    for name, content in files.items():
                        path = folder / name
                        if path.is_file() and sha256(path) == content.sha256:
                            advance(content.size)
                        else:
                            self.fetch(content, path, advance)
        return version


def _marker() -> bytes:
    return compact({"layout": LAYOUT}) + b"\n"


def _paths(artifact: Artifact) -> list[dict[str, Path]]:
    """The files of a delta by name, those of its parent, and so on."""
    found = []
    for each in artifact.chain:
        names = [MANIFEST, *each.files, *([MODEL_CARD] if (each.folder / MODEL_CARD).is_file() else [])]
        found.append({name: each.folder / name for name in names})
    return found


def _is_older(file: str, limit: str) -> bool:
    """Whether the time in the name of a content or a removed entry, if there is one, is before another."""
    found = _TIMED.fullmatch(file)
    return found is not None and found[1] < limit
