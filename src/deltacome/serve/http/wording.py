"""What is wrong with a request, in words of the API instead of the validator's."""

from typing import Any

from deltacome.serve.http.protocol import MOST_CHOICES, MOST_LOGPROBS, MOST_STOP

EXPECTED = {
    "model": "the name of a model",
    "prompt": "a text, up to 64 texts, a list of tokens, or up to 64 lists of tokens, none of them empty",
    "messages": "a list of at least one message",
    "role": "system, developer, user or assistant; tools are not supported",
    "content": "a text or a list of parts of type text; images, audio and files are not supported",
    "name": "a text",
    "type": '"text"',
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
