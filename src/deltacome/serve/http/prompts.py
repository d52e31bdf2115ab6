"""What a request asks of its model: prompts in tokens, a grammar for the answers, and calls that may be in them."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.serve.call_stream import CallStream
from deltacome.serve.calls import CallFormat, calls_grammar, markers
from deltacome.serve.grammars import json_grammar
from deltacome.serve.http.errors import ApiError
from deltacome.serve.http.messages import Message, NamedTool, Tool
from deltacome.serve.http.protocol import ChatRequest, CompletionRequest
from deltacome.serve.languages import Language
from deltacome.serve.registry import Loaded


@dataclass(frozen=True)
class Calls:
    """Calls that answers may have. form: of the model's calls. tools: which may be called. marks: of the form, by the
    tokens that they are.
    """

    form: CallFormat
    tools: list[Tool]
    is_parallel: bool
    marks: dict[int, str]

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the arguments, by the tools' names."""
        return {tool.function.name: tool.function.schema_of_arguments for tool in self.tools}

    def stream(self) -> CallStream:
        """To find them in an answer."""
        return CallStream(self.form, self.schemas, self.is_parallel)


@dataclass(frozen=True)
class Prepared:
    """What a request asks of its model. prompts: token ids of each. grammar: that answers are held to, if any. texts:
    of prompts that are to stand before their answers.
    """

    prompts: list[list[int]]
    grammar: str | None = None
    calls: Calls | None = None
    texts: list[str] = field(default_factory=list)


def prepare_completion(body: CompletionRequest, loaded: Loaded) -> Prepared:
    """Of a text, of several, of tokens, or of several lists of tokens."""
    tokenizer = loaded.language.tokenizer
    prompts: Any = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    tokens = [tokenizer(one).input_ids if isinstance(one, str) else one for one in prompts]
    texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts] if body.echo else []
    return Prepared(tokens, texts=texts)


def prepare_chat(body: ChatRequest, loaded: Loaded) -> Prepared:
    """Of a conversation, by the model's own chat template.

    Raises:
        ApiError: if it is one that the template has no place for.
        GrammarError: if a schema is too large.
    """
    callable_tools = _callable(body)
    shown = [tool.plain for tool in body.tools or []] if callable_tools else []
    prompt = encode_chat(loaded, body.messages, shown, body.add_generation_prompt, body.continue_final_message)
    calls = _calls(callable_tools, body, loaded.language) if callable_tools else None
    schema = None if body.response_format is None else body.response_format.schema_of_answers
    grammar = None if schema is None else json_grammar(schema)
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    if calls is not None and (must_call or schema is not None):
        otherwise = None if must_call else schema
        grammar = calls_grammar(calls.form, calls.schemas, loaded.language.tokenizer, calls.is_parallel, otherwise)
    return Prepared([prompt], grammar, calls)


def encode_chat(
    loaded: Loaded,
    messages: list[Message],
    tools: list[dict[str, Any]],
    begins_answer: bool | None,
    is_continued: bool | None,
) -> list[int]:
    """Token ids of a conversation.

    Args:
        begins_answer: whether the prompt ends with what begins an answer; None if it does unless one is continued.
        is_continued: whether the last message is the beginning of the answer.

    Raises:
        ApiError: if the template has no place for something, or refuses it.
    """
    template = loaded.language.encoder.template or ""
    if is_continued and (begins_answer or messages[-1].role != "assistant"):
        message = "continue_final_message needs a last message of the assistant's, and no add_generation_prompt"
        raise ApiError(400, message, param="continue_final_message")
    if tools and not re.search(r"\btools\b", template):
        raise ApiError(400, "the chat template of this model has no place for tools", param="tools")
    if any(message.tool_calls for message in messages) and "tool_calls" not in template:
        raise ApiError(400, "the chat template of this model has no place for tool_calls", param="messages")
    try:
        return loaded.language.encoder.prompt(
            [message.plain for message in messages],
            tools=tools or None,
            begins_answer=not is_continued if begins_answer is None else begins_answer,
            is_continued=bool(is_continued),
        )
    except DeltacomeError as error:
        raise ApiError(400, str(error), param="messages") from error


def _callable(body: ChatRequest) -> list[Tool]:
    """The tools that a request's answers may call.

    Raises:
        ApiError: if one has to be called that is not there.
    """
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            message = f"tool_choice names {json.dumps(choice.function.name)}, which is not among tools"
            raise ApiError(400, message, param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice requires a call, and there are no tools", param="tool_choice")
    return [] if choice == "none" else tools


def _calls(tools: list[Tool], body: ChatRequest, language: Language) -> Calls:
    """How answers may call them.

    Raises:
        ApiError: if it is not known how the model calls tools.
    """
    if language.calls is None:
        message = "the chat template of this model does not tell how it calls tools; the server's --tool-format would"
        raise ApiError(400, message, param="tools")
    marks = markers(language.calls, language.tokenizer)
    return Calls(language.calls, tools, body.parallel_tool_calls is not False, marks)
