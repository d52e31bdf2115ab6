"""Deltas found by name when a request first asks for them: in `DELTACOME_DELTA_DIR`, and in `DELTACOME_STORE`."""

import asyncio
import time
from pathlib import Path

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.format.manifest import MANIFEST
from deltacome.store.cache import Held
from deltacome.store.fetching import Fetching
from deltacome.vllm import internals

LOOK_SECONDS = 2.0  # in which a store is looked at once, however many names are asked for
WAIT_SECONDS = 5.0  # for that; then what was seen before has to do


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


class StoreResolver(internals.LoRAResolver):
    """Looks a model's name up in a store, and fetches its delta.

    What vLLM knows by name stays in the cache as long as this process lives: vLLM reads it again at any time.
    """

    def __init__(self, fetching: Fetching) -> None:
        self.fetching = fetching
        self._held: dict[str, Held] = {}  # by digest
        self._look: asyncio.Task[None] | None = None
        self._looked = float("-inf")
        self._fingerprint: asyncio.Task[str] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> internals.LoRARequest | None:
        """As vLLM's; vLLM gives the number.

        Raises:
            HTTPException: if the store has it and does not give it; vLLM's log has the reason.
        """
        await self._refresh()
        try:
            entry = await self.fetching.find(lora_name)
            if entry is None or entry.fingerprint != await self._fingerprint_of(base_model_name):
                return None
            held = await self.fetching.hold(entry)
        except DeltacomeError as error:
            internals.logger.error("%s cannot be fetched: %s", lora_name, error)
            raise internals.HTTPException(503, f"{lora_name} cannot be fetched from the store; see the log") from error
        if self._held.setdefault(entry.digest, held) is not held:
            held.close()
        return internals.LoRARequest(lora_name, 1, str(held.folder))

    async def _fingerprint_of(self, base: str) -> str:
        """The base's, taken once: what is on another is not fetched, for vLLM says nothing of what it refuses."""
        if self._fingerprint is None:
            self._fingerprint = asyncio.create_task(asyncio.to_thread(lambda: Checkpoint(base).fingerprint()))
        return await asyncio.shield(self._fingerprint)

    async def _refresh(self) -> None:
        """See what there is, if the store says so in time."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked > LOOK_SECONDS):
            self._look = asyncio.create_task(self.fetching.look())
            self._looked = time.monotonic()
        await asyncio.wait({self._look}, timeout=WAIT_SECONDS)
        if self._look.done() and self._look.exception() is not None:
            internals.logger.error("%s", self._look.exception())
