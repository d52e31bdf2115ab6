"""A server under mixed load while its tenants come and go; `make attack` does it for `--churn` seconds."""

import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from deltacome.format.artifact import Artifact
from deltacome.serve.engine.scheduler import Limits
from serving import alone, client, make_app, metric, post_json, serving

pytest_plugins = ["serving"]
TEXTS = [f"Say {i}" for i in range(4)] + ["Tell me. " * 25]  # the last one is read in parts
LONGEST_GROWTH = 20 * 2**20  # bytes
Merged = dict[str, tuple[Any, Any]]


class Load:
    """What clients do to a server until the time is up, each on a thread of its own.

    expected: what each model says to each text when it is alone. Every client checks what it is told.
    """

    def __init__(self, address: str, expected: dict[tuple[str, str], str], sources: Path, deltas: Path, end: float):
        self.address, self.expected, self.sources, self.deltas, self.end = address, expected, sources, deltas, end
        self.api = client(address)
        self.counts: Counter[str] = Counter()
        self.memory: list[int] = []
        self.lock = threading.Lock()

    def repeat(self, kind: str, act: Callable[[Random], None], seed: int) -> None:
        random = Random(f"{kind} {seed}")
        while time.monotonic() < self.end:
            act(random)
            with self.lock:
                self.counts[kind] += 1

    def ask(self, random: Random, name: str | None = None, tenant: str | None = None) -> None:
        """A question in one of the ways in which clients ask. name: of the model, if it is not its tenant's."""
        tenant = tenant or random.choice(["base", "a", "b"])
        text, messages = random.choice(TEXTS), [{"role": "user", "content": ""}]
        messages[0]["content"] = text
        options: Any = {"model": name or tenant, "messages": messages, "temperature": 0, "max_tokens": 10}
        options |= random.choice([{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"top_p": 0.9}])
        if random.random() < 0.5:
            found = [choice.message.content for choice in self.api.chat.completions.create(**options).choices]
        else:
            found = [""] * options.get("n", 1)
            for chunk in self.api.chat.completions.create(**options, stream=True):
                for choice in chunk.choices:
                    found[choice.index] += choice.delta.content or ""
        assert found == [self.expected[tenant, text]] * len(found), (tenant, text, options)

    def vanish(self, random: Random) -> None:
        """A client that goes away somewhere in its request or in the answer."""
        body = b'{"model": "a", "prompt": "x", "max_tokens": 200, "stream": true}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        data = head.encode() + b"\r\n\r\n" + body
        host, port = self.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            part = random.choice([len(data), random.randrange(len(data))])
            connection.sendall(data[:part])
            if part == len(data):
                connection.recv(random.randrange(1, 2000))
        time.sleep(random.random() / 10)

    def err(self, random: Random) -> None:
        """A request that is refused."""
        content, status = random.choice(
            [
                ({"model": "nobody", "prompt": "x"}, 404),
                ({"model": "a", "prompt": "x", "temperature": -1}, 400),
                ({"model": "a", "prompt": [5] * 600}, 400),
                ({"model": "a", "prompt": [100_000]}, 400),
                ({"model": "a", "prompt": "x", "max_tokens": 10_000}, 400),
                ({"model": "a"}, 400),
            ]
        )
        assert post_json(self.address, "/v1/completions", content)[0] == status, content
        time.sleep(random.random() / 10)

    def change(self, random: Random) -> None:
        """A delta that is loaded, asked and unloaded again, or replaced by another of its name."""
        source, name = random.choice("ab"), f"loaded-{random.randrange(3)}"
        content = {"lora_name": name, "lora_path": f"sources/{source}", "load_inplace": True}
        status, answer = post_json(self.address, "/v1/load_lora_adapter", content)
        assert status == 200, answer
        self.ask(random, name, source)
        if random.random() < 0.5:
            assert post_json(self.address, "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
        self.memory.append(psutil.Process().memory_info().rss)

    def watch(self, random: Random) -> None:
        """A delta that is copied into the watched folder, asked as soon as it is known, and removed."""
        source, name = random.choice("ab"), f"watched {random.randrange(3)}"
        shutil.copytree(self.sources / source, self.deltas / name)
        self._wait_until(name, True)
        self.ask(random, name, source)
        shutil.rmtree(self.deltas / name)
        self._wait_until(name, False)

    def _wait_until(self, name: str, is_known: bool) -> None:
        end = time.monotonic() + 60
        while (name in [model.id for model in self.api.models.list()]) != is_known:
            assert time.monotonic() < end, name
            time.sleep(0.1)


@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.attack)])
def test_mixed_load(
    is_long: bool,
    folder: Path,
    tmp_path: Path,
    merged: Merged,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No answer is wrong or lost, no place stays taken, and the memory is flat at the end."""
    seconds = pytestconfig.getoption("--churn") if is_long else 8
    deltas = tmp_path / "deltas"
    shutil.copytree(folder / "deltas", deltas)
    shutil.copytree(folder / "deltas", deltas / "sources")
    expected = {(name, text): alone(merged, name, text, 10) for name in ("base", "a", "b") for text in TEXTS}
    limit = int(2.9 * Artifact(deltas / "a").bytes)  # less than all that is asked for: some wait, some are dropped
    app = make_app(folder, deltas={}, folder=deltas, memory_limit=limit, limits=Limits(rows=8, cache=2048))
    with serving(app) as address:
        load = Load(address, expected, folder / "deltas", deltas, time.monotonic() + seconds)
        clients = [*[("ask", load.ask)] * 5, ("vanish", load.vanish), ("err", load.err)]
        clients += [("change", load.change), ("watch", load.watch)]
        with ThreadPoolExecutor(len(clients)) as pool:
            futures = [pool.submit(load.repeat, kind, act, seed) for seed, (kind, act) in enumerate(clients)]
            for future in futures:
                future.result()
        end = time.monotonic() + 20
        gauges = ("batch_rows", "queue_sequences")
        while any(metric(address, f"deltacome_{gauge}") for gauge in gauges):
            assert time.monotonic() < end, "a place stays taken"
            time.sleep(0.1)
        registry = app.state.service.registry
        assert not any(loaded.uses for loaded in registry.in_memory)
    assert all(load.counts[kind] for kind, _ in clients)
    if is_long:
        third = len(load.memory) // 3
        grown = (sum(load.memory[-third:]) - sum(load.memory[third : 2 * third])) / third
        with capsys.disabled():
            print(f"\n{seconds:g} s: {dict(load.counts)}, memory grew by {grown / 2**20:.1f} MiB")
        assert grown < LONGEST_GROWTH
