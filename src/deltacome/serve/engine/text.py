"""Text from tokens as they come, cut at stop strings."""

from collections.abc import Mapping
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
MOST_PENDING = 16  # tokens that are decoded again with the next, when no character is complete
CHARACTER = 4  # bytes of a character at most, and so tokens that may be parts of one


class TextStream:
    """The text of an answer: complete characters at once, but nothing that may be the beginning of a stop string.

    A token takes the same time however many came before. shown: special tokens that are text here, with it.
    """

    def __init__(self, tokenizer: Any, stop: list[str], shown: Mapping[int, str] | None = None) -> None:
        self.tokenizer, self.stops, self.shown = tokenizer, [_Stop(text) for text in stop], shown or {}
        self.tokens: list[int] = []
        self.start = 0  # of the tokens that are decoded with the next, for the spaces between
        self.done = 0  # tokens whose text is out
        self.held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that can be given out after another token."""
        self.tokens.append(token)
        before, text = self._decode(self.done), self._decode(len(self.tokens))
        if token in self.shown:
            return self._release(text[len(before) :] + self.shown[token], len(self.tokens))
        if not text.endswith(INCOMPLETE):
            return self._release(text[len(before) :], len(self.tokens))
        if len(self.tokens) - self.done > MOST_PENDING:
            # No character at all, then: give out what nothing that comes can turn into one.
            for end in range(len(self.tokens) - CHARACTER, self.done, -1):
                part = self._decode(end)
                if text.startswith(part):
                    return self._release(part[len(before) :], end)
        return ""

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        before, text = self._decode(self.done), self._decode(len(self.tokens))
        text = self._release(text[len(before) :], len(self.tokens))
        return text if self.is_stopped else text + self.held

    def _decode(self, end: int) -> str:
        text: str = self.tokenizer.decode(self.tokens[self.start : end], skip_special_tokens=True)
        return text

    def _release(self, text: str, done: int) -> str:
        """Note that the tokens up to `done` are decoded; what of their text can be given out."""
        self.start, self.done = self.done, done
        whole = self.held + text
        for end, character in enumerate(text, len(self.held) + 1):
            found = [len(stop.text) for stop in self.stops if stop.add(character)]
            if found:
                self.is_stopped, self.held = True, ""
                return whole[: end - max(found)]
        kept = len(whole) - max((stop.matched for stop in self.stops), default=0)
        self.held = whole[kept:]
        return whole[:kept]


class _Stop:
    """A stop string, and how many of its characters the text so far ends with (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self.shorter = [0] * len(text)  # for each beginning, the longest shorter one that it ends with
        for i in range(1, len(text)):
            self.shorter[i] = self._extend(self.shorter[i - 1], text[i])

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self.shorter[matched - 1]
        return matched + (self.text[matched] == character)

    def add(self, character: str) -> bool:
        """Whether the string ends with this character of the text."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.text)
