"""deltacome: full fine-tunes of language models as compressed deltas on one base."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltacome.artifact import Artifact
    from deltacome.compression import compress
    from deltacome.errors import DeltacomeError
    from deltacome.merging import merge
    from deltacome.runtime.model import load

__all__ = ["Artifact", "DeltacomeError", "__version__", "compress", "load", "merge"]
_HOMES = {
    "Artifact": "artifact",
    "DeltacomeError": "errors",
    "compress": "compression",
    "load": "runtime.model",
    "merge": "merging",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deltacome' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"deltacome.{_HOMES[name]}"), name)
