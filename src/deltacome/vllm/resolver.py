"""Deltas found by name in the folder that `DELTACOME_DELTA_DIR` names, when a request first asks for them."""

from pathlib import Path

from deltacome.format.manifest import MANIFEST
from deltacome.vllm import internals


class DeltaResolver(internals.LoRAResolver):
    """Looks a model's name up among the deltas in a folder; nothing outside it can be reached, links included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> internals.LoRARequest | None:
        """As vLLM's; vLLM gives the number."""
        if not lora_name or lora_name.startswith(".") or "/" in lora_name or "\0" in lora_name:
            return None
        folder = (self.folder / lora_name).resolve()
        if folder.parent != self.folder or not (folder / MANIFEST).is_file():
            return None
        return internals.LoRARequest(lora_name, 1, str(folder))
