"""Where a delta on a delta finds its parent, and that one its own, up to the first, which is on the base alone."""

from pathlib import Path
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.files import SIDECARS
from deltacome.format.manifest import MANIFEST, MODEL_CARD, read_manifest
from deltacome.hub import locate

MOST_PARENTS = 64  # above a delta; all of them are added up whenever it is used


class ParentError(DeltacomeError):
    """A parent that is missing, another one, or broken: its child may be whole, and is one when the parent comes."""


def locate_artifact(source: str | Path) -> Path:
    """The folder of an artifact, which may be named by a hub id.

    Raises:
        DeltacomeError: if there is none.
    """
    return locate(str(source), [MANIFEST, MODEL_CARD, "*.safetensors", *SIDECARS])


def find_lineage(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The folders of a delta's parent, of that one's, and so on; none if it has no parent.

    A parent lies beside its child under the name that this gives it, or on the Hub if that is an id, and its manifest
    has the SHA-256 that the child names. So no delta can be its own ancestor.

    Raises:
        ParentError: if one is missing, or not the one that its child was made on; if there are too many.
    """
    found = [folder]
    while "parent" in manifest:
        if len(found) > MOST_PARENTS:
            raise ParentError(f"{folder} is under more than {MOST_PARENTS} other deltas; flatten one of them")
        parent, manifest = _find_parent(found[-1], manifest["parent"])
        found.append(parent)
    return found[1:]


def _find_parent(child: Path, named: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder and the manifest of a parent. named: its `name` and `sha256`."""
    name, sha256 = named["name"], named["sha256"]
    folder = child.resolve().parent / name.rpartition("/")[2]
    why = f"{child} is a delta on the delta {name}"
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if "/" in name and (manifest is None or manifest["sha256"] != sha256):
        try:
            folder = locate_artifact(name)
        except DeltacomeError as error:
            raise ParentError(f"{why}, which is not beside it as {folder.name}: {error}") from error
        manifest = read_manifest(folder)
    if manifest is None:
        raise ParentError(f"{why}, and there is no such delta beside it; put that one into {folder}")
    if manifest["sha256"] != sha256:
        raise ParentError(
            f"{why}, and {folder} is not the one that it was made on (its manifest's SHA-256 differs); put that there"
        )
    return folder, manifest
