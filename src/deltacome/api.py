"""What `import deltacome` offers."""

from deltacome.compression.pipeline import compress
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.restore.merging import merge
from deltacome.runtime.model import load

__all__ = ["Artifact", "DeltacomeError", "compress", "load", "merge"]
