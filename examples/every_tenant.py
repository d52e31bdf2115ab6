"""Ask every model of a running server once, all at once, and say what it took: does the server hold its tenants?

    python every_tenant.py http://127.0.0.1:8000 --new-tokens 32

With --pid of the server its memory is told too. The API key, if there is one, is taken from OPENAI_API_KEY. Needs the
package `openai`.
"""

import argparse
import asyncio
import os
import statistics
import time

import psutil
from openai import AsyncOpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--prompt", default="What is 12 + 30?")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pid", type=int, help="of the server")
    arguments = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = AsyncOpenAI(base_url=f"{arguments.address}/v1", api_key=key, max_retries=0, timeout=600)
    asyncio.run(ask_all(client, arguments))


async def ask_all(client: AsyncOpenAI, arguments: argparse.Namespace) -> None:
    names = [model.id async for model in client.models.list()]
    print(f"{len(names)} models")
    for what in ("first time", "again"):
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, name, arguments) for name in names))
        seconds = time.perf_counter() - start
        tokens, first = sum(count for count, _ in answers), [moment for _, moment in answers]
        print(
            f"{what}: {len(answers)} answers, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second; "
            f"first token after {statistics.median(first):.1f} s (median), {max(first):.1f} s at most"
        )
    if arguments.pid:
        print(f"memory of the server: {psutil.Process(arguments.pid).memory_info().rss / 2**20:.0f} MiB")


async def ask(client: AsyncOpenAI, model: str, arguments: argparse.Namespace) -> tuple[int, float]:
    """Tokens of an answer, and seconds to the first of them."""
    start = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.prompt}],
        max_tokens=arguments.new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, tokens = None, 0
    async for chunk in stream:
        if first is None and any(choice.delta.content for choice in chunk.choices):
            first = time.perf_counter() - start
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return tokens, time.perf_counter() - start if first is None else first


if __name__ == "__main__":
    main()
