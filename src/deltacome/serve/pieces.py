"""The bytes that tokens stand for, which need not be whole characters."""

import json
import re
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class Pieces:
    """A tokenizer's vocabulary in bytes, for byte-level BPE and for SentencePiece with bytes for what it lacks.

    Tokens of other tokenizers are the text that they decode to alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        kinds = _decoders(tokenizer)
        self._bytes: dict[str, int] | None = None
        if "ByteLevel" in kinds:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self._is_sentencepiece = bool(kinds & {"ByteFallback", "Metaspace"})

    def bytes_of(self, token: int) -> bytes | None:
        """None for a number that is no token, such as those that pad a vocabulary."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if token not in self.tokenizer.added_tokens_decoder:
            if self._bytes is not None and all(character in self._bytes for character in piece):
                return bytes(self._bytes[character] for character in piece)
            if self._is_sentencepiece:
                byte = BYTE.fullmatch(piece)
                return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode(errors="replace")
        text: str = self.tokenizer.decode([token])
        return text.encode(errors="replace")

    def text_of(self, token: int) -> str:
        """A token's text; in the API's own form where its bytes are no text: `bytes:\\xe2\\x80`."""
        found = self.bytes_of(token)
        if found is None:
            return f"token_id:{token}"
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def by_text(self, token: int, logprob: float, others: list[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities of a token and of others by their texts; of those with the same, all but one by number."""
        found = {self.text_of(token): logprob}
        for other, value in others:
            if other != token:
                text = self.text_of(other)
                found[f"token_id:{other}" if text in found else text] = value
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of steps from tokens to text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return {"ByteFallback"} if hasattr(tokenizer, "sp_model") else set()
    if fast.decoder is None:
        return set()
    decoder = json.loads(fast.decoder.__getstate__())
    return {step["type"] for step in [decoder, *decoder.get("decoders", [])]}
