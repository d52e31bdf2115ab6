"""Text from tokens as they come, cut at stop strings."""

from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class TextStream:
    """The text of an answer: complete characters at once, but nothing that may be the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: list[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.start = 0  # of the tokens that are decoded with the next, for the spaces between
        self.done = 0  # tokens whose text is out
        self.held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that can be given out after another token."""
        self.tokens.append(token)
        text = self._decode(len(self.tokens))
        if text.endswith(INCOMPLETE):
            return ""
        return self._release(text)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        text = self._release(self._decode(len(self.tokens)))
        return text if self.is_stopped else text + self.held

    def _decode(self, end: int) -> str:
        before = self.tokenizer.decode(self.tokens[self.start : self.done], skip_special_tokens=True)
        text = self.tokenizer.decode(self.tokens[self.start : end], skip_special_tokens=True)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        self.start, self.done = self.done, len(self.tokens)
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.is_stopped, self.held = True, ""
            return text[: min(found)]
        hold = max(
            (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]
