"""Examples from JSONL files, and their token ids through a tokenizer's chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from deltacome.errors import DeltacomeError, reason

NO_TEMPLATE = "none"
PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # inputs of models with an entry for each token, 0 for text


@dataclass(frozen=True)
class Example:
    """One line of a file: a conversation to be completed, or plain text.

    messages: the turns before the completion; empty for plain text. completion: what the model is to answer; for
    plain text, the text. answer: what is compared instead of the completion, if given. image: a file that the
    conversation begins with, for a vision-language model.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    answer: str | None = None
    image: Path | None = None


@dataclass(frozen=True)
class Encoded:
    """An example, or a prompt alone, as a model takes it.

    ids: tokens. start: the first position that counts, 1 at least, for the first token is predicted by nothing. image:
    what the model takes besides, by the names of its arguments, as transformers' processors give it for one row.
    """

    ids: list[int]
    start: int = 1
    image: Mapping[str, Tensor] = field(default_factory=dict)


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """Examples from a JSONL file; a line has `prompt` and `completion`, or `messages`, or `text`.

    The last of `messages` is the completion and must be the assistant's. With a prompt or messages there may be an
    `image`, a file's path as seen from the JSONL file.

    Raises:
        DeltacomeError: if the file is missing or empty, or a line is none of these, or its image is missing; the line's
            number is named.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltacomeError(f"there is no file {path}")
    examples = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_parse(line, path.parent, f"{path}, line {number}"))
                if limit is not None and len(examples) == limit:
                    break
    except UnicodeDecodeError as error:
        raise DeltacomeError(f"{path} is not UTF-8 text: {error}") from error
    if not examples:
        raise DeltacomeError(f"{path} holds no examples")
    return examples


def _parse(line: str, folder: Path, where: str) -> Example:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DeltacomeError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DeltacomeError(f"{where}: not a JSON object")
    answer = content.get("answer")
    answer = None if answer is None else str(answer)
    image = None
    if content.get("image") is not None and "text" not in content:
        image = folder / str(content["image"])
        if not image.is_file():
            raise DeltacomeError(f"{where}: there is no image {image}")
    match content:
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Example(({"role": "user", "content": prompt},), completion, answer, image)
        case {"messages": [*messages]} if len(messages) > 1 and all(_is_message(message) for message in messages):
            if messages[-1]["role"] != "assistant":
                raise DeltacomeError(f"{where}: the last message must be the assistant's")
            return Example(tuple(messages[:-1]), messages[-1]["content"], answer, image)
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
    it and without a template of the tokenizer's, prompts are taken bare too. processor: of a vision-language model, see
    `deltacome.language.load_processor`, for examples with images.

    Raises:
        DeltacomeError: if the template's file is missing, or, later, the template refuses a conversation.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, processor: Any = None) -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self.template: str | None = tokenizer.chat_template or getattr(processor, "chat_template", None)
        if chat_template == NO_TEMPLATE:
            self.template = None
        elif chat_template is not None:
            if not Path(chat_template).is_file():
                raise DeltacomeError(f"there is no file {chat_template}; give a Jinja template or 'none'")
            self.template = Path(chat_template).read_text(encoding="utf-8")

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        begins_answer: bool = True,
        is_continued: bool = False,
    ) -> list[int]:
        """Token ids up to where the model's answer starts.

        Args:
            messages: with what a template may know besides role and content, such as `tool_calls`.
            tools: functions, for templates that have a place for them.
            begins_answer: whether the prompt ends with what begins an answer.
            is_continued: whether the last message is the beginning of the answer.
        """
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": begins_answer,
            "continue_final_message": is_continued,
        }
        return self.tokenizer(self._text(messages, **options), **self._options()).input_ids

    def question(self, example: Example) -> Encoded:
        """An example's messages up to where the answer starts, and its image.

        The image's token is put in front of the user's first message, unless a message has it already.

        Raises:
            DeltacomeError: if there is an image and no processor, or one that cannot be read, or not with this prompt.
        """
        if example.image is None:
            return Encoded(self.prompt(example.messages))
        if self.processor is None:
            raise DeltacomeError(f"an example has an image ({example.image}), which nothing here can see; leave it out")
        token = getattr(self.processor, "image_token", "<image>")
        is_placed = any(token in message["content"] for message in example.messages)
        text = self._text(example.messages, "" if is_placed else token)
        picture = _open_image(example.image)
        try:
            image = dict(self.processor(images=picture, text=text, return_tensors="pt", **self._options()))
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            raise DeltacomeError(f"the processor refuses {example.image} with its prompt: {reason(error)}") from error
        del image["attention_mask"]
        return Encoded(image.pop("input_ids")[0].tolist(), image=image)

    def example(self, example: Example) -> Encoded:
        """Token ids of prompt and completion, end token included, and where the completion starts.

        Plain text starts at its second token, the first one being predicted by nothing.
        """
        if not example.messages:
            return Encoded(self.tokenizer(example.completion).input_ids)
        prompt = self.question(example)
        completion = self.tokenizer(example.completion, add_special_tokens=False).input_ids
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return replace(prompt, ids=[*prompt.ids, *completion, *end], start=len(prompt.ids))

    def _options(self) -> dict[str, bool]:
        """The tokenizer's: a template has the special tokens in it."""
        return {} if self.template is None else {"add_special_tokens": False}

    def _text(self, messages: Sequence[Mapping[str, Any]], image_token: str = "", **options: Any) -> str:
        """The prompt as text; an image, if its token is given, is in front of the user's first message."""
        found: list[dict[str, Any]] = [dict(message) for message in messages]
        first = next((message for message in found if message["role"] == "user"), found[0])
        if self.template is not None and re.search("""(['"])image\\1""", self.template):
            for message in found:  # such a template may leave out contents that are no lists
                message["content"] = [{"type": "text", "text": message["content"]}]
            if image_token:
                first["content"].insert(0, {"type": "image"})
        elif image_token:
            first["content"] = f"{image_token}\n{first['content']}"
        if self.template is None:
            return "\n".join(message["content"] for message in found)
        try:
            return self.tokenizer.apply_chat_template(
                found, chat_template=self.template, tokenize=False, **{"add_generation_prompt": True, **options}
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:  # of what is in the messages
            raise DeltacomeError(f"the chat template refuses a conversation: {reason(error)}") from error


def _open_image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as broken files have it
        raise DeltacomeError(f"{path} is no image that can be read: {reason(error)}") from error


def collate(rows: Sequence[Encoded], left: bool) -> dict[str, Tensor]:
    """What a model is called with for a batch of these rows: ids and mask padded as `pad` does, and their images."""
    ids, mask = pad([row.ids for row in rows], left)
    inputs = {"input_ids": ids, "attention_mask": mask}
    for key in {key for row in rows for key in row.image}:
        if key in PER_TOKEN:
            known = [row.image[key][0].tolist() if key in row.image else [] for row in rows]
            filled = [[*some, *[0] * (len(row.ids) - len(some))] for some, row in zip(known, rows, strict=True)]
            inputs[key] = pad(filled, left)[0]
        else:
            inputs[key] = torch.cat([row.image[key] for row in rows if key in row.image])
    return inputs


def pad(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor (rows, longest), and its attention mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask
