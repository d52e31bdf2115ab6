"""The manifest of an artifact, and the names of its files."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.format.entries import compact
from deltacome.hub import HUB_ID

FORMAT_VERSION = 5
CHILD_VERSION = 6  # of an artifact with a parent, which readers of version 5 would leave out
SKETCH_VERSION = 7  # of one with a sketch, whether it has a parent or not
VERSIONS = (FORMAT_VERSION, CHILD_VERSION, SKETCH_VERSION)
MANIFEST = "deltacome.json"
WEIGHTS = "delta"
MODEL_CARD = "README.md"
NO_DIGEST = "0" * 64
DIGEST_START = b'{"sha256":"'
MOST_BYTES = 2**25  # of a manifest: 100,000 matrices
# Suffixes of what programs take for weights, of which only ours are in an artifact.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".index.json")
FIELDS: dict[str, Any] = {
    "method": dict,
    "base": dict,
    "finetuned": dict,
    "finetuned_bytes": int,
    "linear_ratio": (int, float),
    "files": dict,
    "base_files": dict,
    "weights": dict,
}


def write_manifest(folder: Path, manifest: dict[str, Any], weight_bytes: int) -> None:
    """Write the manifest, with the artifact ratio that its own size leads to and its own digest in front."""
    ratio = 0.0
    for _ in range(4):  # the ratio's digits change the size by a byte at most
        text = DIGEST_START + NO_DIGEST.encode() + b'",' + compact({**manifest, "ratio": ratio})[1:]
        ratio = round(manifest["finetuned_bytes"] / (weight_bytes + len(text)), 3)
    digest = hashlib.sha256(text).hexdigest().encode()
    (folder / MANIFEST).write_bytes(text.replace(NO_DIGEST.encode(), digest, 1))


def plain_file_name(name: str) -> str:
    """A file name without folders, so that a tampered manifest reaches nothing outside.

    Raises:
        ValueError: if it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}", name):
        raise ValueError(f"file name {name[:300]!r}")
    return name


def is_weight_file(name: str) -> bool:
    """Whether a file in an artifact has that name for holding weights."""
    return re.fullmatch(rf"{WEIGHTS}(-\d{{5,}}-of-\d{{5,}})?\.safetensors", name) is not None


def travelling_file_name(name: str) -> str:
    """A plain name of a file that goes into a rebuilt checkpoint and that nothing there takes for weights.

    Raises:
        ValueError: if it is none.
    """
    plain_file_name(name)
    if name.endswith(WEIGHT_SUFFIXES) or name in (MANIFEST, "adapter_config.json"):
        raise ValueError(f"file name {name!r}")
    return name


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its digest, version and the kinds of its fields checked.

    Raises:
        DeltacomeError: if it is not what was written, or of another format version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DeltacomeError(f"there is no folder {folder}")
    if not path.is_file():
        raise DeltacomeError(f"{folder} is no compressed delta: it has no {MANIFEST}")
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        manifest = _parse_json(text)
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeltacomeError(f"{path} is damaged: it is not the JSON that was written ({error})") from error
    if version not in VERSIONS:
        raise DeltacomeError(
            f"{folder} has format version {str(version)[:20]}, and this deltacome reads versions {FORMAT_VERSION} to "
            f"{SKETCH_VERSION}; install the release that wrote it, or compress again"
        )
    start = len(DIGEST_START)
    blank = text[:start] + NO_DIGEST.encode() + text[start + len(NO_DIGEST) :]
    if (
        not text.startswith(DIGEST_START)
        or text[start : start + 64].decode("ascii", "replace") != hashlib.sha256(blank).hexdigest()
    ):
        raise DeltacomeError(f"{path} has been changed since it was written (its SHA-256 differs); fetch it again")
    if not isinstance(manifest.get("ratio"), int | float):
        raise DeltacomeError(f"{path} is damaged: it names no ratio")
    is_child = "parent" in manifest
    fits = version in ((CHILD_VERSION, SKETCH_VERSION) if is_child else (FORMAT_VERSION, SKETCH_VERSION))
    if not fits or (is_child and not _names_parent(manifest["parent"])):
        raise DeltacomeError(
            f"{path} is damaged: version {CHILD_VERSION} names a parent, {SKETCH_VERSION} may, and no other does"
        )
    return manifest


def _names_parent(field: Any) -> bool:
    is_named = isinstance(field, dict) and isinstance(field.get("name"), str) and is_parent_name(field["name"])
    return is_named and _is_digest(field.get("sha256"))


def is_parent_name(name: str) -> bool:
    """Whether a parent may be called so: by a hub id, or as a folder that lies beside its child and nowhere else."""
    is_folder = name.isprintable() and name not in ("", ".", "..") and not set("/\\").intersection(name)
    return HUB_ID.fullmatch(name) is not None or (is_folder and len(name) < 256)


def check_fields(manifest: dict[str, Any]) -> None:
    """Check that all fields are there, each of its kind; weights are for `WeightEntry.parse`.

    Raises:
        KeyError, ValueError: naming what is wrong.
    """
    for key, kind in FIELDS.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise ValueError(key)
    texts = {key: manifest[key]["name"] for key in ("method", "base", "finetuned")}
    for key, text in {**texts, "fingerprint": manifest["base"]["fingerprint"]}.items():
        if not isinstance(text, str):
            raise ValueError(f"the name in {key}")
    factor = manifest["method"].get("rescaled", 1.0)
    if not isinstance(factor, float) or not 0.9 <= factor <= 1.1:
        raise ValueError(f"rescaled by {factor!r}")
    for name, digest in {**manifest["files"], **manifest["base_files"]}.items():
        if not _is_digest(digest):
            raise ValueError(f"the SHA-256 of {name}")
    if manifest["finetuned_bytes"] < 0 or manifest["files"].keys() & manifest["base_files"].keys():
        raise ValueError("finetuned_bytes, or a file twice")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _parse_json(text: bytes) -> Any:
    """JSON in UTF-8, of which every reader makes the same: no key twice, no NaN or infinity, no half characters.

    Raises:
        ValueError: if it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number[:20]}")
        return value

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        compact(content)  # raises where a character is half of a surrogate pair
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content
