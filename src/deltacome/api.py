"""What `import deltacome` offers: each name is imported on its first use.

`deltacome --help` and `except deltacome.DeltacomeError` must not wait for torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltacome.compression.pipeline import compress, flatten
    from deltacome.errors import DeltacomeError
    from deltacome.format.artifact import Artifact
    from deltacome.restore.exporting import export
    from deltacome.restore.merging import merge
    from deltacome.runtime.model import load

__all__ = ["Artifact", "DeltacomeError", "compress", "export", "flatten", "load", "merge"]
HOMES = {
    "Artifact": "format.artifact",
    "DeltacomeError": "errors",
    "compress": "compression.pipeline",
    "export": "restore.exporting",
    "flatten": "compression.pipeline",
    "load": "runtime.model",
    "merge": "restore.merging",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'deltacome' has no attribute {name!r}")
    return getattr(import_module(f"deltacome.{HOMES[name]}"), name)
