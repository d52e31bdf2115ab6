"""How long answers wait for their next tokens while the server's engine reads a long prompt beside them.

    python long_prompt.py BASE --delta math=MATH --delta intent=INTENT --rows 16 --length 4000

Random tokens: answers behind 300 tokens each, the deltas taking turns, then the long prompt. Printed are milliseconds
between two tokens of the first answer: alone, while the prompt is read, and while it is answered too.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

import deltacome
from deltacome.serve.engine.sampling import Sampling
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.engine.sequence import Event, Sequence
from deltacome.serve.engine.text import TextStream

TOKENS = 20  # of the first answer, alone and beside the long prompt's answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=DELTA")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=4000)
    arguments = parser.parse_args()
    model: Any = deltacome.load(arguments.base, dict(delta.split("=", 1) for delta in arguments.delta))
    tenants, tokenizer = list(model.deltas.values()), AutoTokenizer.from_pretrained(arguments.base)
    engine = Engine(model, Limits(cache=10**6))
    times: list[list[float]] = []

    def ask(length: int) -> list[float]:
        """Submit a prompt of random tokens; the times of its answer's tokens."""
        own: list[float] = []

        def note(event: Event) -> None:
            if event.token is not None:
                own.append(time.perf_counter())

        prompt = torch.randint(100, model.config.vocab_size, (length,)).tolist()
        text = TextStream(tokenizer, [])
        sequence = Sequence(tenants[len(times) % len(tenants)], prompt, 10**6, set(), Sampling(0.0), text, note)
        engine.submit([sequence])
        times.append(own)
        return own

    def step(until: Callable[[], object], name: str = "") -> None:
        start = len(times[0]) - 1
        while not until():
            engine.step()
        if name:
            between = torch.tensor(times[0][start:], dtype=torch.float64).diff() * 1000
            quantiles = between.quantile(torch.tensor([0.5, 0.99, 1.0], dtype=torch.float64)).tolist()
            print(f"{name}: median {quantiles[0]:.0f}, p99 {quantiles[1]:.0f}, max {quantiles[2]:.0f}", flush=True)

    def more() -> Callable[[], bool]:
        end = len(times[0]) + TOKENS
        return lambda: len(times[0]) >= end

    for _ in range(arguments.rows):
        ask(300)
    step(lambda: all(times))
    step(more(), "alone")
    begun = time.perf_counter()
    long = ask(arguments.length)
    step(lambda: long, f"while {arguments.length} tokens are read")
    print(f"first token of the long prompt: {long[0] - begun:.1f} s")
    step(more(), "while it is answered")


if __name__ == "__main__":
    main()
