"""Check a real server on real models: what it answers under load is what each merged model answers alone.

    python serve_check.py BASE --delta math=MATH_DELTA=math_test.jsonl --delta intent=INTENT_DELTA=intent_test.jsonl

First 32 requests at once, deltas and base mixed; then minutes of load during which deltas are added, replaced and
removed all the time. Greedy and in float32, so that every answer can be compared. Needs the package `openai`.
"""

import argparse
import itertools
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, read_examples
from deltacome.restore.merging import load_merged, open_checked
from mixed_batch import answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=DELTA=PROMPTS.jsonl")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=6)
    arguments = parser.parse_args()

    deltas = {name: (folder, file) for name, folder, file in (item.split("=") for item in arguments.delta)}
    share = -(-arguments.requests // len(deltas))
    prompts = [example.messages for _, file in deltas.values() for example in read_examples(file, share)]
    names = ["base", *deltas]
    asked = [(names[i % len(names)], messages) for i, messages in enumerate(prompts[: arguments.requests])]
    folders = {name: folder for name, (folder, _) in deltas.items()}
    expected = alone(arguments.base, folders, asked, arguments.new_tokens)
    print(f"{len(expected)} answers of merged models alone, {len(set(expected))} of them different", flush=True)

    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
        for name, folder in folders.items():
            shutil.copytree(folder, Path(temporary) / name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = ["--name", "base", "--delta-dir", temporary, "--port", str(port)]
        command = [sys.executable, "-m", "deltacome.cli", "serve", str(arguments.base), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(server.stderr), daemon=True)
            reader.start()
            try:
                check(port, server.pid, arguments, asked, expected, list(deltas))
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait()
                reader.join()
            errors = [line for line in lines if '"level": "error"' in line]
            print(f"server stopped with status {server.returncode}, {len(errors)} errors in its log")
            raise SystemExit(bool(server.returncode or errors))


def alone(base: Path, deltas: dict[str, str], asked: list, new_tokens: int) -> list[str]:
    """The answer of each request's merged model to it alone."""
    checkpoint, found = Checkpoint(base), {}
    for name in ["base", *deltas]:
        if name == "base":
            model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), None
            tokenizer = AutoTokenizer.from_pretrained(base)
        else:
            model, tokenizer = load_merged(checkpoint, open_checked(checkpoint, deltas[name]))
        encoder = Encoder(tokenizer)
        for i, (own, messages) in enumerate(asked):
            if own == name:
                with torch.inference_mode():
                    tokens = answers(model, [encoder.prompt(messages)], tokenizer.eos_token_id, new_tokens)[0]
                found[i] = tokenizer.decode(tokens, skip_special_tokens=True)
    return [found[i] for i in range(len(asked))]


def check(
    port: int, pid: int, arguments: argparse.Namespace, asked: list, expected: list[str], deltas: list[str]
) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    while True:
        try:
            client.models.list()
            break
        except Exception:
            time.sleep(0.2)

    def ask(number: int, model: str | None = None) -> bool:
        name, messages = asked[number]
        answer = client.chat.completions.create(
            model=model or name, messages=list(messages), temperature=0, max_tokens=arguments.new_tokens
        )
        return answer.choices[0].message.content == expected[number]

    with ThreadPoolExecutor(len(asked)) as pool:
        started = time.perf_counter()
        same = sum(pool.map(ask, range(len(asked))))
        print(f"{same} of {len(asked)} answers at once are the merged model's, {time.perf_counter() - started:.1f} s")

    end = time.monotonic() + 60 * arguments.minutes
    counts = {"answers": 0, "wrong": 0, "lost": 0, "changes": 0}
    memory: list[int] = []
    lock = threading.Lock()

    def count(number: int, model: str | None = None) -> None:
        try:
            key = "answers" if ask(number, model) else "wrong"
        except Exception as error:
            print(f"lost: {type(error).__name__}: {error}", flush=True)
            key = "lost"
        with lock:
            counts[key] += 1

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        while time.monotonic() < end:
            count(numbers.randrange(len(asked)))

    def change() -> None:
        for turn in itertools.count():
            if time.monotonic() > end:
                return
            source, name = deltas[turn % len(deltas)], f"extra-{turn % 3}"
            content = {"lora_name": name, "lora_path": source, "load_inplace": True}
            client.post("/load_lora_adapter", body=content, cast_to=str)
            count(next(number for number, (own, _) in enumerate(asked) if own == source), name)
            if turn % 2:
                client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)
            counts["changes"] += 1
            memory.append(psutil.Process(pid).memory_info().rss)

    with ThreadPoolExecutor(arguments.workers + 1) as pool:
        for job in [pool.submit(change), *(pool.submit(work, seed) for seed in range(arguments.workers))]:
            job.result()
    part = max(1, len(memory) // 4)
    early, late = statistics.mean(memory[part : 2 * part]), statistics.mean(memory[-part:])
    print(f"{arguments.minutes:g} minutes of load: {counts}")
    print(f"memory in the second quarter {early / 2**20:.0f} MiB, in the last {late / 2**20:.0f} MiB")
    if same < len(asked) or counts["wrong"] or counts["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
