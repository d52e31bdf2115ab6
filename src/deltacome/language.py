"""What turns text into tokens and back: the tokenizer of a checkpoint, and the tokens that end its answers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltacome.errors import DeltacomeError, reason
from deltacome.files import sidecars_in

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: str, folder: Path, base: Path | None = None) -> Any:
    """The tokenizer in a folder, or the base's where there is no vocabulary in it.

    What there is without a vocabulary, such as a chat template, is taken together with the base's.

    Args:
        source: what errors call the folder.
        base: the base's folder.

    Raises:
        DeltacomeError: if transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as temporary:
        if base is not None and not _has_vocabulary(folder):
            for path in sidecars_in(folder):
                shutil.copyfile(path, Path(temporary) / path.name)
            folder = Path(temporary)
            add_vocabulary(folder, base)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of whatever type a tokenizer's own reader raises
            raise DeltacomeError(f"transformers cannot load the tokenizer of {source}: {reason(error)}") from error


def add_vocabulary(folder: Path, base: Path) -> None:
    """Put into a folder without a vocabulary those of the base's files that it has not."""
    for path in () if _has_vocabulary(folder) else sidecars_in(base):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def load_processor(source: str, folder: Path) -> Any:
    """What makes a vision-language model's inputs of text and images.

    Args:
        source: what errors call the folder.

    Raises:
        DeltacomeError: if the folder has none, transformers cannot load it, or Pillow is missing.
    """
    from transformers import AutoProcessor

    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DeltacomeError("images need Pillow: pip install 'deltacome[images]'") from error
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise DeltacomeError(f"transformers cannot load the processor of {source}: {reason(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise DeltacomeError(f"{source} takes no images; leave them out of the data")
    return processor


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES) or any(folder.glob("*.tiktoken"))


def end_tokens(generation_config: Path | None, config: Path | None) -> set[int]:
    """The tokens that end an answer: those in generation_config.json, or in config.json where that names none.

    A file that is not there names none.

    Raises:
        DeltacomeError: if a file is not a model's configuration.
    """
    for path in (generation_config, config):
        if path is None or not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            for part in (settings, settings.get("text_config") or {}):
                found = as_set(part.get("eos_token_id"))
                if found:
                    return found
        except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
            raise DeltacomeError(f"{path} names no end token that can be read: {reason(error)}") from error
    return set()


def as_set(tokens: int | Sequence[int] | None) -> set[int]:
    """A token, several or none, as configurations have them.

    Raises:
        TypeError: if it is something else.
    """
    found = [] if tokens is None else [tokens] if isinstance(tokens, int) else [*tokens]
    if not all(isinstance(token, int) for token in found):
        raise TypeError(f"{tokens!r} is no token")
    return set(found)


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """An answer's tokens before the first that ends it."""
    return next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)
