"""Examples from JSONL files, and their token ids through a tokenizer's chat template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from deltacome.errors import DeltacomeError

NO_TEMPLATE = "none"


@dataclass(frozen=True)
class Example:
    """One line of a file: a conversation to be completed, or plain text.

    messages: the turns before the completion; empty for plain text. completion: what the model is to answer; for
    plain text, the text. answer: what is compared instead of the completion, if given.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    answer: str | None = None


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """Examples from a JSONL file; a line has `prompt` and `completion`, or `messages`, or `text`.

    The last of `messages` is the completion and must be the assistant's.

    Raises:
        DeltacomeError: if the file is missing or empty, or a line is none of these; the line's number is named.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltacomeError(f"there is no file {path}")
    examples = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_parse(line, f"{path}, line {number}"))
                if limit is not None and len(examples) == limit:
                    break
    except UnicodeDecodeError as error:
        raise DeltacomeError(f"{path} is not UTF-8 text: {error}") from error
    if not examples:
        raise DeltacomeError(f"{path} holds no examples")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DeltacomeError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DeltacomeError(f"{where}: not a JSON object")
    answer = content.get("answer")
    answer = None if answer is None else str(answer)
    match content:
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Example(({"role": "user", "content": prompt},), completion, answer)
        case {"messages": [*messages]} if len(messages) > 1 and all(_is_message(message) for message in messages):
            if messages[-1]["role"] != "assistant":
                raise DeltacomeError(f"{where}: the last message must be the assistant's")
            return Example(tuple(messages[:-1]), messages[-1]["content"], answer)
        case {"text": str(text)} if text:
            return Example((), text)
    raise DeltacomeError(f"{where}: needs the texts `prompt` and `completion`, or `messages`, or `text`")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


class Encoder:
    """Examples to token ids, through a chat template.

    chat_template: a Jinja file to use instead of the tokenizer's own template, or `none` for the bare prompt. Without
    it and without a template of the tokenizer's, prompts are taken bare too.

    Raises:
        DeltacomeError: if the template's file is missing, or, later, the template refuses a conversation.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = tokenizer.chat_template
        if chat_template == NO_TEMPLATE:
            self.template = None
        elif chat_template is not None:
            if not Path(chat_template).is_file():
                raise DeltacomeError(f"there is no file {chat_template}; give a Jinja template or 'none'")
            self.template = Path(chat_template).read_text(encoding="utf-8")

    def prompt(self, messages: tuple[dict[str, str], ...]) -> list[int]:
        """Token ids up to where the model's answer starts."""
        if self.template is None:
            return self.tokenizer("\n".join(message["content"] for message in messages)).input_ids
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise DeltacomeError(f"the chat template refuses a conversation: {error}") from error
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def example(self, example: Example) -> tuple[list[int], int]:
        """Token ids of prompt and completion, end token included, and where the completion starts.

        Plain text starts at its second token, the first one being predicted by nothing.
        """
        if not example.messages:
            return self.tokenizer(example.completion).input_ids, 1
        prompt = self.prompt(example.messages)
        completion = self.tokenizer(example.completion, add_special_tokens=False).input_ids
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [*prompt, *completion, *end], len(prompt)


def pad(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor (rows, longest), and its attention mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask
