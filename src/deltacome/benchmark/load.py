"""Load for a server: requests that come when they come, whether or not the earlier ones are answered."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Planned:
    """A request: seconds after the start when it is sent, the model it asks, and the user's message."""

    seconds: float
    model: str
    messages: Messages
    is_long: bool = False


@dataclass
class Answered:
    """What became of a request: seconds from when it was sent to the first token and to the last, and the answer.

    between: seconds from each token to the next.
    """

    model: str
    is_long: bool = False
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    between: list[float] = field(default_factory=list)
    ended: float = 0.0  # seconds after the start of the whole load
    failed: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens, mean."""
        return None if self.first is None or self.tokens < 2 else (self.last - self.first) / (self.tokens - 1)


def plan(prompts: dict[str, list[Messages]], count: int, rate: float, skew: float, seed: int) -> list[Planned]:
    """`count` requests at `rate` a second on average, in a Poisson process.

    prompts: for each model, its users' conversations. skew: the models' shares of the load are as 1, 1/2^skew,
    1/3^skew, ... in their order (Zipf).
    """
    generator = random.Random(seed)
    names = list(prompts)
    weights = [1 / (place + 1) ** skew for place in range(len(names))]
    asked = dict.fromkeys(names, 0)
    found, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(rate)
        name = generator.choices(names, weights)[0]
        found.append(Planned(now, name, prompts[name][asked[name] % len(prompts[name])]))
        asked[name] += 1
    return found


def lengthen(
    planned: list[Planned], *, system_words: int, long_share: float, long_words: int, seed: int
) -> list[Planned]:
    """The same requests behind a system message, one for each model, and some of them with a long message.

    The words are the requests' own, at random. long_share: of the requests, spread evenly.
    """
    words = " ".join(message["content"] for request in planned for message in request.messages).split()

    def text(count: int, *parts: object) -> str:
        return " ".join(random.Random(repr((seed, *parts))).choices(words, k=count))

    found = []
    for number, request in enumerate(planned):
        is_long = int((number + 1) * long_share) > int(number * long_share)
        *before, last = request.messages
        if system_words:
            before = [{"role": "system", "content": text(system_words, request.model)}, *before]
        if is_long:
            last = {**last, "content": f"{text(long_words, number)} {last['content']}"}
        found.append(replace(request, messages=(*before, last), is_long=is_long))
    return found


async def drive(host: str, port: int, planned: list[Planned], new_tokens: int, ignore_eos: bool) -> list[Answered]:
    """Send the requests at their times and read their streams."""
    started = time.perf_counter()

    async def one(request: Planned) -> Answered:
        await asyncio.sleep(request.seconds - (time.perf_counter() - started))
        answered = Answered(request.model, request.is_long)
        try:
            await _ask(host, port, request, new_tokens, ignore_eos, answered)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            answered.failed = f"{type(error).__name__}: {error}"
        answered.ended = time.perf_counter() - started
        return answered

    return list(await asyncio.gather(*(one(request) for request in planned)))


async def _ask(host: str, port: int, request: Planned, new_tokens: int, ignore_eos: bool, answered: Answered) -> None:
    body = json.dumps(
        {
            "model": request.model,
            "messages": request.messages,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        status = (await reader.readline()).split()[1].decode()
        async for line in reader:
            if line.startswith(b"{"):
                raise ValueError(f"status {status}: {line.decode()}")
            if not line.startswith(b"data: {"):
                continue
            content: dict[str, Any] = json.loads(line[6:])
            if "error" in content:
                raise ValueError(content["error"]["message"])
            if content.get("usage"):
                answered.prompt_tokens = content["usage"]["prompt_tokens"]
                details = content["usage"].get("prompt_tokens_details") or {}  # vLLM has none, unless it is told to
                answered.cached_tokens = details.get("cached_tokens") or 0
                answered.tokens = content["usage"]["completion_tokens"]
            for choice in content["choices"]:
                if "role" in choice["delta"]:
                    continue  # before the first token
                now = time.perf_counter() - sent
                if answered.first is None:
                    answered.first = now
                else:
                    answered.between.append(round(now - answered.last, 4))
                answered.last = now
                answered.text += choice["delta"].get("content") or ""
    finally:
        writer.close()
    if not answered.tokens:
        raise ValueError(f"status {status}, and the stream broke off")
