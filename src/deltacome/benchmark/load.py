"""Load for a server: requests that come when they come, whether or not the earlier ones are answered."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Planned:
    """A request: seconds after the start when it is sent, the model it asks, and the user's message."""

    seconds: float
    model: str
    messages: tuple[dict[str, str], ...]


@dataclass
class Answered:
    """What became of a request: seconds from when it was sent to the first token and to the last, and the answer."""

    model: str
    text: str = ""
    tokens: int = 0
    first: float | None = None
    last: float = 0.0
    ended: float = 0.0  # seconds after the start of the whole load
    failed: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens, mean."""
        return None if self.first is None or self.tokens < 2 else (self.last - self.first) / (self.tokens - 1)


def plan(
    prompts: dict[str, list[tuple[dict[str, str], ...]]], count: int, rate: float, skew: float, seed: int
) -> list[Planned]:
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


async def drive(host: str, port: int, planned: list[Planned], new_tokens: int, ignore_eos: bool) -> list[Answered]:
    """Send the requests at their times and read their streams."""
    started = time.perf_counter()

    async def one(request: Planned) -> Answered:
        await asyncio.sleep(request.seconds - (time.perf_counter() - started))
        answered = Answered(request.model)
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
                answered.tokens = content["usage"]["completion_tokens"]
            for choice in content["choices"]:
                if "role" in choice["delta"]:
                    continue  # before the first token
                answered.last = time.perf_counter() - sent
                answered.text += choice["delta"].get("content") or ""
                if answered.first is None:
                    answered.first = answered.last
    finally:
        writer.close()
    if not answered.tokens:
        raise ValueError(f"status {status}, and the stream broke off")
