"""deltacome: full fine-tunes of language models as compressed deltas on one base."""

from typing import TYPE_CHECKING, Any

from deltacome import api
from deltacome.version import __version__

if TYPE_CHECKING:
    from deltacome.api import Artifact, DeltacomeError, compress, export, load, merge

__all__ = ["Artifact", "DeltacomeError", "__version__", "compress", "export", "load", "merge"]


def __getattr__(name: str) -> Any:
    return getattr(api, name)
