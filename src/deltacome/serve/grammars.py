"""Answers held to a grammar: which tokens may come next, so that what comes is JSON of a schema."""

import math
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.serve.pieces import Pieces

# Schemas come from strangers. A grammar is compiled in a second or two at most, and a mask takes milliseconds.
LIMITS = LLParserLimits(
    max_grammar_size=100_000,
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
MOST_PARTS = 5_000  # keys and items of a schema
MOST_MULTIPLE = 10_000  # the product of all `multipleOf`: as many states follow a number's digits
NO_TEXT = "no text keeps to it"
MOST_KEPT = 32  # compiled grammars of a vocabulary
OPTIONS = {"whitespace_pattern": r"\x20|\x0A\x20{0,24}"}  # in a line or indented, but no spaces for ever


class GrammarError(DeltacomeError):
    """A schema that cannot be kept to."""


def with_options(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as the library takes it.

    Raises:
        GrammarError: if it is larger than what is compiled here.
    """
    parts, multiple, unseen = 0, 1, [schema]
    while unseen:
        found: Any = unseen.pop()
        items = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        parts += len(items)
        unseen += items
        factor = found.get("multipleOf") if isinstance(found, dict) else None
        if isinstance(factor, int) or (isinstance(factor, float) and math.isfinite(factor)):
            multiple *= max(1, abs(Decimal(str(factor)).as_integer_ratio()[0]))
    if parts > MOST_PARTS:
        raise GrammarError(f"it has {parts:,} keys and items, and {MOST_PARTS:,} are allowed")
    if multiple > MOST_MULTIPLE:
        raise GrammarError(f"its multipleOf together must not be larger than {MOST_MULTIPLE:,}")
    return {**schema, "x-guidance": OPTIONS}


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of the texts that a JSON schema allows.

    Raises:
        GrammarError: as `with_options`, or if it is no text that can be encoded.
    """
    try:
        return LLMatcher.grammar_from_json_schema(with_options(schema))
    except ValueError as error:
        raise GrammarError(_sentence(str(error))) from error


class Matcher:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """One for another answer."""
        return Matcher(self._matcher.deep_copy())

    def allowed(self, size: int) -> Tensor:
        """Which tokens may come next, of booleans (size,).

        Raises:
            GrammarError: if that takes more than a schema may take.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = torch.zeros(size, dtype=torch.bool)
        known = np.unpackbits(bits, bitorder="little")[:size]
        mask[: len(known)] = torch.from_numpy(known.view(bool))
        return mask

    def add(self, token: int) -> None:
        """A token has come.

        Raises:
            GrammarError: if the grammar does not allow it, or as `allowed`.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_sentence(self._matcher.get_error()))


class Grammars:
    """Grammars over the vocabulary of a tokenizer; for any thread.

    ends: tokens that end an answer.
    """

    def __init__(self, pieces: Pieces, ends: set[int]) -> None:
        self.pieces, self.ends = pieces, ends
        self._vocabulary: LLTokenizer | None = None
        self._lock = Lock()
        self._compiled = lru_cache(MOST_KEPT)(self._compile)

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of an answer. The first one takes a second, for the vocabulary.

        Args:
            grammar: from `json_grammar`, or in llguidance's own language.

        Raises:
            GrammarError: if the library cannot compile it, no text keeps to it, or it takes too much.
        """
        return self._compiled(grammar).copy()

    def _compile(self, grammar: str) -> Matcher:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
        found = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        if found.is_error():
            raise GrammarError(_sentence(found.get_error()))
        matcher = Matcher(found)
        if not matcher.copy().allowed(self._vocabulary.vocab_size).any():
            raise GrammarError(NO_TEXT)
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        tokenizer = self.pieces.tokenizer
        count = max(tokenizer.get_vocab().values()) + 1
        tokens = [self.pieces.bytes_of(token) or b"" for token in range(count)]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | self.ends
        ends = sorted(end for end in self.ends if end < count)
        if not ends:  # the library wants one; a model has no logit for this
            ends, tokens = [count], [*tokens, b""]
        wrapper = TokenizerWrapper(_Vocabulary(tokenizer, tokens, sorted(special), ends[0]))
        return LLTokenizer(wrapper, eos_token=ends)


class _Vocabulary:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokenizer, self.tokens, self.special_token_ids, self.eos_token_id = tokenizer, tokens, special, end

    def __call__(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found


def _sentence(message: str) -> str:
    """Of what the library says, which shows where an expression is wrong in lines between."""
    first, *others = message.strip().splitlines() or ["it cannot be compiled"]
    if first.startswith("NoExtension"):
        return NO_TEXT
    return " ".join([first, *(line for line in others if line.startswith("error: "))])[:300]
