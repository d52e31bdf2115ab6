"""What turns text into tokens and back, shared by the models that have it from the same files."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder
from deltacome.runtime.conversation import load_language
from deltacome.runtime.tenant import Tenant
from deltacome.serve.calls import FORMATS, CallFormat, find_format
from deltacome.serve.grammars import Grammars
from deltacome.serve.pieces import Pieces


@dataclass(eq=False)
class Language:
    """A tokenizer and a chat template, which take more memory than many a delta. ends: tokens that end an answer.

    calls: how tools are called, if that is known.
    """

    tokenizer: Any
    encoder: Encoder
    ends: set[int]
    calls: CallFormat | None = None
    pieces: Pieces = field(init=False)
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.tokenizer)
        self.grammars = Grammars(self.pieces, self.ends)


class Languages:
    """The languages of a base and its tenants, each in memory once, as long as a model uses it."""

    def __init__(self, base: Checkpoint, chat_template: str | None, tool_format: str | None = None) -> None:
        self.base, self.chat_template, self.tool_format = base, chat_template, tool_format
        self._known: WeakValueDictionary[tuple[frozenset[tuple[str, str]], frozenset[int]], Language]
        self._known = WeakValueDictionary()  # by files, and by end tokens, which config.json may name

    def of(self, tenant: Tenant | None) -> Language:
        """A tenant's, or for None the base's.

        Raises:
            DeltacomeError: if transformers cannot load it.
        """
        key = self._files(tenant), frozenset() if tenant is None else tenant.ends
        language = self._known.get(key)
        if language is None:
            tokenizer, ends = load_language(self.base, tenant)
            encoder = Encoder(tokenizer, self.chat_template)
            calls = FORMATS[self.tool_format] if self.tool_format else find_format(encoder.template)
            language = Language(tokenizer, encoder, ends, calls)
            self._known[key] = language
        return language

    def _files(self, tenant: Tenant | None) -> frozenset[tuple[str, str]]:
        """Names and digests of the files that it comes from."""
        if tenant is None or tenant.artifact is None:
            files = {path.name: str(self.base.sidecar_digest(path.name)) for path in self.base.sidecars()}
        else:
            files = {**tenant.artifact.base_files, **tenant.artifact.files}
        others = {"config.json", "README.md"}
        return frozenset(
            (name, digest) for name, digest in files.items() if name not in others and not name.endswith(".safetensors")
        )
