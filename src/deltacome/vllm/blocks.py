"""What the plugin touches of vLLM's prefix cache: blocks of a delta are found again by what is in it.

vLLM's own key has an adapter's name and path, under which another delta may lie by now.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import vllm.v1.core.kv_cache_utils as kv_cache_utils
from vllm.v1.engine.core import EngineCore

from deltacome.files import sha256
from deltacome.format.manifest import MANIFEST
from deltacome.vllm.internals import get_adapter_absolute_path

_digests: dict[tuple[int, str], str] = {}  # of what was loaded, by an adapter's number and path


def install() -> None:
    """Put it in place, in the process that schedules requests."""
    load, keys = EngineCore.add_lora, kv_cache_utils._gen_lora_extra_hash_keys

    @wraps(load)  # vLLM reads from its signature what to make of a message
    def add_lora(self: Any, lora_request: Any) -> bool:
        _digests.pop((lora_request.lora_int_id, lora_request.lora_path), None)
        return bool(load(self, lora_request))

    def extra_keys(request: Any) -> list[tuple[str, str, str]]:
        return [(kind, name, path + _digest(request.lora_request)) for kind, name, path in keys(request)]

    EngineCore.add_lora = add_lora
    kv_cache_utils._gen_lora_extra_hash_keys = extra_keys


def _digest(adapter: Any) -> str:
    key = adapter.lora_int_id, adapter.lora_path
    if key not in _digests:
        manifest = Path(get_adapter_absolute_path(adapter.lora_path)) / MANIFEST  # which has the digests of all files
        _digests[key] = f"#{sha256(manifest)}" if manifest.is_file() else ""
    return _digests[key]
