"""What a model reads and writes: its tokens, its tokenizer and chat template, and what ends its answers."""

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.hf import maybe_make_thread_pool

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError, reason
from deltacome.files import sha256
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.manifest import MANIFEST
from deltacome.language import add_vocabulary
from deltacome.restore.merging import copy_sidecars
from deltacome.vllm.internals import get_adapter_absolute_path, vocabulary_of_base
from deltacome.vllm.towers import is_of_text
from deltacome.vllm.vocabulary import vocabulary

DELTAS = 1024  # of which what there is to know stays in memory
TOKENIZERS = 64  # that do, of those that are not the base's


@dataclass(frozen=True)
class Files:
    """A fine-tuned model's beside its weights, by names and digests. delta: a folder that has them."""

    digests: frozenset[tuple[str, str]]
    delta: str = field(compare=False)


class Speech:
    """What vLLM would read from the files of a merged model.

    Args:
        config: the base's `ModelConfig`.

    Raises:
        DeltacomeError: if it cannot.
    """

    def __init__(self, config: Any, base: Checkpoint, delta: str) -> None:
        self._folder = TemporaryDirectory(prefix="deltacome-")  # as long as this object, since vLLM looks there again
        folder = Path(self._folder.name)
        copy_sidecars(Artifact(delta), base, folder)
        own = copy(config)
        own.model = own.tokenizer = str(folder)
        own.revision = own.tokenizer_revision = own.hf_config_path = own._hf_config_revision = None
        own.trust_remote_code = False
        try:
            self.generation: dict[str, Any] = own.try_get_generation_config()
            self.sampling: dict[str, Any] = own.get_diff_sampling_param()
            add_vocabulary(folder, base.folder)
            self.tokenizer = copy(cached_tokenizer_from_config(own))
            maybe_make_thread_pool(self.tokenizer, config.renderer_num_workers + 1)  # as vLLM's renderer does
        except Exception as error:  # of whatever type a tokenizer's own reader raises
            raise DeltacomeError(f"vLLM cannot load the tokenizer of {delta}: {reason(error)}") from error

    def extends(self, tokenizer: Any) -> bool:
        """Whether every token of another tokenizer has the same number here."""
        if self._extends is None:
            self._extends = tokenizer.get_vocab().items() <= self.tokenizer.get_vocab().items()
        return self._extends

    _extends: bool | None = None


@dataclass(frozen=True)
class Language:
    """A model's.

    vocabulary: how many tokens it has. speech: None for the base's. sight: something of its own for a model that makes
    other embeddings of an image than the base.
    """

    vocabulary: int
    speech: Speech | None = None
    sight: str = ""


class Languages:
    """Those of a base and its deltas. config: vLLM's `ModelConfig`."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._read = lru_cache(DELTAS)(self._read_delta)
        self._speech = lru_cache(TOKENIZERS)(self._load_speech)
        self._locate = lru_cache(DELTAS)(get_adapter_absolute_path)  # which may ask a hub

    @cached_property
    def base(self) -> Language:
        """The base's own."""
        return Language(vocabulary_of_base(self.config))

    def of(self, adapter: Any) -> Language:
        """That of a `LoRARequest`, read again if its folder has another delta now; the base's for None.

        Raises:
            DeltacomeError: if a delta is broken, or vLLM cannot read its files.
        """
        if adapter is None:
            return self.base
        folder = self._locate(adapter.lora_path)
        try:
            found = (Path(folder) / MANIFEST).stat()
        except OSError:  # no delta
            return self.base
        size, sight, files = self._read(folder, found.st_mtime_ns, found.st_ino)
        return Language(size, None if files is None else self._speech(files), sight)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.config.model)

    def _read_delta(self, folder: str, time: int, inode: int) -> tuple[int, str, Files | None]:
        artifact = Artifact(folder)
        size = vocabulary(artifact.weights)
        of_text = all(is_of_text(name) for name, entry in artifact.weights.items() if _is_changed(entry))
        sight = "" if of_text else f"#{sha256(Path(folder) / MANIFEST)}"
        found = artifact.sidecars()
        others = {"README.md"} | ({"config.json"} if "generation_config.json" in found else set())  # which has the ends
        if self.config.skip_tokenizer_init or not any(found[name] for name in found.keys() - others):
            return size, sight, None
        digests = {**artifact.base_files, **artifact.files}
        return size, sight, Files(frozenset((name, digests[name]) for name in found.keys() - others), folder)

    def _load_speech(self, files: Files) -> Speech:
        return Speech(self.config, self._checkpoint, files.delta)


def _is_changed(entry: WeightEntry) -> bool:
    return bool(entry.factored or entry.sign or entry.coded or entry.dense is not None)


def with_vocabulary(config: Any, size: int) -> Any:
    """A `ModelConfig` of another vocabulary."""
    own = copy(config)
    own.model_arch_config = replace(config.model_arch_config, vocab_size=size)
    return own
