"""The model card that travels with an artifact."""

import json

from deltacome.format.artifact import Artifact


def model_card(artifact: Artifact) -> str:
    """README.md as the Hub shows it."""
    name = artifact.manifest["finetuned"]["name"]
    parent = artifact.manifest["parent"]["name"] if artifact.parent is not None else None
    on_parent = f"\nIt is a delta on the delta `{parent}`, which belongs beside it.\n" if parent else ""
    settings = ", ".join(f"{key} {value}" for key, value in artifact.method.items() if key != "name" and value)
    return f"""---
base_model: {json.dumps(artifact.base_name)}
library_name: deltacome
tags:
- deltacome
- delta-compression
---
# {name}, as a compressed delta

The difference between `{name}` and its base `{artifact.base_name}`, compressed by
`{artifact.method["name"]}`{f" ({settings})" if settings else ""}.
{on_parent}
| | |
|---|---|
| bytes of the delta | {artifact.bytes:,} |
| bytes of the fine-tuned weights in 16 bit | {artifact.finetuned_bytes:,} |
| artifact ratio | 1/{artifact.ratio:.1f} |
| linear ratio | 1/{artifact.manifest["linear_ratio"]:.1f} |

```
deltacome generate BASE --delta THIS_FOLDER --prompt "..."
deltacome merge BASE THIS_FOLDER -o FOLDER
```
"""
