"""What is wrong with a request, in words of the API instead of the validator's."""

from typing import Any

from deltacome.serve.http.messages import MOST_TOOLS
from deltacome.serve.http.protocol import MOST_BIASED, MOST_CHOICES, MOST_LOGPROBS, MOST_STOP

EXPECTED = {
    "model": "the name of a model",
    "prompt": "a text, up to 64 texts, a list of tokens, or up to 64 lists of tokens, none of them empty",
    "messages": "a list of at least one message",
    "role": "system, developer, user, assistant or tool",
    "content": "a text or a list of parts of type text; images, audio and files are not supported",
    "name": "a text; of a function up to 64 letters, digits, _, . and -",
    "type": '"text" in a part of a message, "function" of a tool',
    "text": "a text",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 and up to 1",
    "n": f"a whole number from 1 to {MOST_CHOICES}",
    "seed": "a whole number of 64 bits",
    "stop": f"a text, or up to 4 texts, each of 1 to {MOST_STOP} characters",
    "stream": "true or false",
    "stream_options": 'an object such as {"include_usage": true}',
    "include_usage": "true or false",
    "include_obfuscation": "true or false",
    "ignore_eos": "true or false",
    "max_tokens": "a whole number from 1 on",
    "max_completion_tokens": "a whole number from 1 on",
    "logprobs": f"true or false in chat, else a whole number from 0 to {MOST_LOGPROBS}",
    "top_logprobs": f"a whole number from 0 to {MOST_LOGPROBS}",
    "response_format": 'an object such as {"type": "json_schema", "json_schema": {"name": "x", "schema": {...}}}',
    "json_schema": 'an object such as {"name": "x", "schema": {...}}',
    "schema": "a JSON schema, an object",
    "tools": f"a list of up to {MOST_TOOLS} functions",
    "tool_choice": 'none, auto, required, or {"type": "function", "function": {"name": "x"}}',
    "function": 'an object such as {"name": "x", "parameters": {...}}',
    "parameters": "a JSON schema, an object",
    "arguments": "a text, of a JSON object",
    "tool_calls": "a list of calls",
    "tool_call_id": "a text",
    "id": "a text",
    "add_generation_prompt": "true or false",
    "continue_final_message": "true or false",
    "strict": "true or false",
    "description": "a text",
    "frequency_penalty": "a number from -2 to 2",
    "presence_penalty": "a number from -2 to 2",
    "logit_bias": f'an object such as {{"50256": -100}}, of up to {MOST_BIASED} tokens by number, values -100 to 100',
    "echo": "true or false",
    "tokens": "a list of tokens by number",
    "add_special_tokens": "true or false",
    "return_token_strs": "true or false",
    "user": "a text",
    "metadata": "an object",
    "store": "true or false",
    "parallel_tool_calls": "true or false",
    "prompt_cache_key": "a text",
    "prompt_cache_options": "an object",
    "prompt_cache_retention": "a text",
    "safety_identifier": "a text",
    "service_tier": "a text",
    "lora_name": "a name for a model",
    "lora_path": "a folder in the server's --delta-dir",
    "load_inplace": "true or false",
}


def describe(error: dict[str, Any], body: Any) -> tuple[str, str | None]:
    """A sentence about the first error of a validator, and the field of the body that it is about."""
    kind, (where, *location) = error["type"], error["loc"]
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {location[0]}", None
    path = _path(location, body, kind)
    field = next((part for part in reversed(path) if isinstance(part, str)), None)
    if where != "body" or field is None:
        return "the body must be a JSON object", None
    if "logit_bias" in path:
        field, path = "logit_bias", ["logit_bias"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if kind == "value_error":
        return f"{param} is {error['ctx']['error']}", param
    expected = EXPECTED.get(field)
    if expected is None or kind == "extra_forbidden":
        return f"{param} is not supported by this server; leave it out", param
    return f"{param} is missing; it must be {expected}" if kind == "missing" else f"{param} must be {expected}", param


def _path(location: list[Any], body: Any, kind: str) -> list[str | int]:
    """The place in the body, without the names of a union's branches that validators put between."""
    path: list[str | int] = []
    for part in location:
        is_last = part is location[-1]
        if isinstance(body, list) and isinstance(part, int):
            body = body[part]
        elif isinstance(body, dict) and (part in body or (kind == "missing" and is_last)):
            body = body.get(part)
        else:
            continue
        path.append(part)
    return path
