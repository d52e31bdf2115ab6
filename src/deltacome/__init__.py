"""deltacome: full fine-tunes of language models as compressed deltas on one base."""

from typing import TYPE_CHECKING, Any

from deltacome.version import __version__

if TYPE_CHECKING:
    from deltacome.api import Artifact, DeltacomeError, compress, load, merge

__all__ = ["Artifact", "DeltacomeError", "__version__", "compress", "load", "merge"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'deltacome' has no attribute {name!r}")
    from deltacome import api

    return getattr(api, name)
