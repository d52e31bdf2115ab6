"""Tokens as bytes: byte-level BPE, SentencePiece with byte fallback, and what is neither."""

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import make_tokenizer
from deltacome.serve.pieces import Pieces
from serving import CHAT

pytest_plugins = ["serving"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words, spaces as a sign of their own, and every byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "A", "é", "▁"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "the": 1, "##re": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def bare() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"the": 0, "é": 1}, unk_token="the")))


@pytest.mark.parametrize("text", ["naïve — 数学 🎉 end", "the é\n\t"])
def test_the_bytes_of_all_tokens_are_the_texts(text: str) -> None:
    tokenizer = make_tokenizer()
    pieces, tokens = Pieces(tokenizer), tokenizer(text).input_ids
    assert b"".join(pieces.bytes_of(token) or b"" for token in tokens) == text.encode()
    pieces = Pieces(sentencepiece())
    assert b"".join(pieces.bytes_of(3 + byte) or b"" for byte in text.encode()) == text.encode()


@pytest.mark.parametrize(
    ("tokenizer", "piece", "expected", "text"),
    [
        (make_tokenizer(), "Ġ", b" ", " "),
        (make_tokenizer(), "â", b"\xe2", r"bytes:\xe2"),
        (make_tokenizer(), "<|im_end|>", b"<|im_end|>", "<|im_end|>"),
        (sentencepiece(), "▁the", b" the", " the"),
        (sentencepiece(), "é", "é".encode(), "é"),
        (sentencepiece(), "<0xE2>", b"\xe2", r"bytes:\xe2"),
        (sentencepiece(), "<0x41>", b"A", "A"),
        (sentencepiece(), "</s>", b"</s>", "</s>"),
        (wordpiece(), "the", b"the", "the"),
        (bare(), "é", "é".encode(), "é"),
    ],
    ids=lambda value: str(value) if isinstance(value, str | bytes) else type(value.backend_tokenizer.model).__name__,
)
def test_a_token(tokenizer: Any, piece: str, expected: bytes, text: str) -> None:
    token = tokenizer.convert_tokens_to_ids(piece)
    assert Pieces(tokenizer).bytes_of(token) == expected and Pieces(tokenizer).text_of(token) == text


def test_a_number_that_is_no_token() -> None:
    pieces = Pieces(make_tokenizer())
    assert pieces.bytes_of(500) is None and pieces.text_of(500) == "token_id:500"


def test_tokens_of_one_text_do_not_collide() -> None:
    pieces = Pieces(sentencepiece())
    byte, letter = (pieces.tokenizer.convert_tokens_to_ids(piece) for piece in ("<0x41>", "A"))
    top = [(letter, -0.5), (byte, -1.5), (3, -float("inf"))]
    assert pieces.by_text(byte, -1.5, top) == {f"token_id:{letter}": -0.5, "A": -1.5, "\0": -float("inf")}
    assert pieces.by_text(letter, -0.5, top)["A"] == -0.5
    assert len(pieces.by_text(7, -9.0, top)) == 4


def test_logprobs_over_http(api: OpenAI, folder: Path) -> None:
    """A random model's answers are full of parts of characters, and its likeliest tokens too."""
    options: Any = {"model": "a", "max_tokens": 60, "temperature": 1.5, "seed": 3, "logprobs": True}
    choice = api.chat.completions.create(messages=CHAT, top_logprobs=20, **options).choices[0]
    assert choice.logprobs and choice.logprobs.content
    tokens = choice.logprobs.content
    written = b"".join(bytes(token.bytes or []) for token in tokens if token.token != "<|im_end|>")
    assert written.decode(errors="replace") == choice.message.content
    assert any(token.token.startswith("bytes:") for token in tokens)
    assert all(len({top.token for top in token.top_logprobs}) == 20 for token in tokens)
    choices = api.completions.create(prompt="x", **{**options, "logprobs": 2}).choices
    found: Any = choices[0].logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob and len(top) in (2, 3)
    assert {len(top) for top in found.top_logprobs} == {2, 3}
