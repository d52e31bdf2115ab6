"""`deltacome serve` and `deltacome benchmark serve`."""

import json
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from commands import fail, run, succeed
from deltacome.benchmark.load import Answered, Planned, lengthen, plan
from deltacome.benchmark.serve import CACHE, DELTAS, DISK, figures_of
from serving import client

pytest_plugins = ["serving"]


def test_the_command_finishes_what_runs_when_told_to_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTACOME_API_KEY", "secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder / "base"), "--delta", f"a={folder / 'deltas/a'}", "--port", str(port)]
    command = [sys.executable, "-m", "deltacome.cli", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "running on" in line:
                break
        api = client(f"http://127.0.0.1:{port}", "secret")
        stream = api.completions.create(model="a", prompt="Private words", max_tokens=300, stream=True, seed=1)
        parts = [next(iter(stream))]
        busy = run(*arguments)
        server.send_signal(signal.SIGTERM)
        parts += list(stream)
        assert parts[-1].choices[0].finish_reason in ("length", "stop") and len(parts) > 50
        lines += list(server.stderr)
        assert server.wait(30) == 0
    assert busy.returncode == 1 and busy.stderr.splitlines()[-1].startswith(f"error: cannot serve on 127.0.0.1:{port}")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    request = next(line for line in found if line["event"] == "request")
    assert request["tenant"] == "a" and request["status"] == "ok" and request["tokens"] == len(parts)
    assert "Private" not in "".join(lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--delta", "a=nothing"], "nothing"),
        (["--delta-dir", "nothing"], "there is no folder nothing"),
        (["--memory-limit", "much"], "much is no size"),
        (["--api-keys", "nothing.json"], "cannot read the keys"),
        (["--max-length", "100000"], "room for 512"),
        (["--delta", ".x=nothing"], "no name for a model"),
    ],
)
def test_bad_commands(folder: Path, options: list[str], said: str) -> None:
    fail(said, "serve", folder / "base", *options)


@pytest.mark.slow
def test_benchmark(folder: Path, tmp_path: Path) -> None:
    """The same requests to both servers: the same answers, and a model loaded whenever another's turn comes."""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"Say {i}", "completion": str(i)}) for i in range(5)]
    data.write_text("\n".join(lines))
    deltas = [part for name in ("a", "b") for part in ("--delta", f"{name}={folder / 'deltas' / name}")]
    options = ("--data", data, "--rate", 20, "--requests", 8, "--max-new-tokens", 6, "--ignore-eos", "--json")
    command = ("benchmark", "serve", folder / "base", *deltas, *options)
    rows = {row["system"]: row for row in json.loads(succeed(*command, "-o", tmp_path / "out"))}
    assert list(rows) == [DELTAS, DISK, CACHE]
    for row in rows.values():
        assert row["same"] == 8 and row["failed"] == 0
        assert row["tokens_per_second"] == pytest.approx(6 * row["requests_per_second"], rel=0.05)
        assert 0 < row["first_median"] <= row["first_p95"] <= row["first_p99"]
    assert rows[DELTAS]["swaps"] == 0 and rows[DISK]["swaps"] >= 2
    assert (tmp_path / "out/serve.png").stat().st_size > 10_000
    assert (tmp_path / "out/serve.md").read_text().count("\n| ") == 5

    more = ("--system", "deltas", "--system-words", 9, "--long-share", 0.25, "--long-words", 40)
    (row,) = json.loads(succeed(*command, *more, "-o", tmp_path / "long"))
    assert (row["system"], row["same"], row["failed"]) == (DELTAS, 8, 0)
    assert 0 < row["between_median"] <= row["between_p99"] and row["first_median"] > 0 < row["long_first_median"]
    answers = json.loads((tmp_path / "long/serve.json").read_text())["answers"]
    assert [answer["is_long"] for answer in answers] == [False, False, False, True] * 2
    assert all(len(answer["between"]) == 5 for answer in answers)
    short, long = ([answer["prompt_tokens"] for answer in answers if answer["is_long"] == kind] for kind in (0, 1))
    assert max(short) < min(long)


def test_a_system_that_there_is_not(folder: Path, tmp_path: Path) -> None:
    options = ("--delta", f"a={folder / 'deltas/a'}", "--data", tmp_path, "-o", tmp_path / "out", "--system", "vllm")
    fail("there is no system vllm to measure", "benchmark", "serve", folder / "base", *options)


def test_lengthened_requests() -> None:
    planned = [Planned(float(i), "ab"[i % 2], ({"role": "user", "content": f"q{i}"},)) for i in range(10)]
    found = lengthen(planned, system_words=5, long_share=0.2, long_words=30, seed=0)
    assert [request.is_long for request in found] == [False, False, False, False, True] * 2
    systems = {request.model: set() for request in planned}  # type: ignore[var-annotated]
    for before, after in zip(planned, found, strict=True):
        system, user = (message["content"] for message in after.messages)
        assert (after.seconds, after.model, after.messages[0]["role"]) == (before.seconds, before.model, "system")
        systems[after.model].add(system)
        assert len(system.split()) == 5 and len(user.split()) == (31 if after.is_long else 1)
        assert user.endswith(before.messages[0]["content"])
    assert len(systems["a"]) == len(systems["b"]) == 1 and systems["a"] != systems["b"]
    assert found[4].messages[1] != found[9].messages[1]
    assert lengthen(planned, system_words=0, long_share=0.0, long_words=30, seed=0) == planned


def test_the_figures_of_a_load() -> None:
    short = [
        Answered("a", tokens=3, prompt_tokens=10, cached_tokens=5, first=0.1, last=0.5, between=[0.1, 0.3], ended=2.0)
        for _ in range(3)
    ]
    long = Answered("a", is_long=True, tokens=2, prompt_tokens=20, first=4.0, last=4.5, between=[0.5], ended=5.0)
    row = figures_of([*short, long, Answered("a", failed="no")])
    assert (row["failed"], row["requests_per_second"], row["tokens_per_second"]) == (1, 0.8, 2.2)
    assert (row["first_p99"], row["long_first_median"], row["token_median"]) == (0.1, 4.0, 200)
    assert (row["between_median"], row["between_p95"], row["cached"]) == (300, 440, 30)
    assert "long_first_median" not in figures_of(short)


def test_the_plan_of_a_load() -> None:
    prompts: Any = {name: [({"role": "user", "content": f"{name}{i}"},) for i in range(3)] for name in "xyz"}
    planned = plan(prompts, 4000, 10.0, 1.0, 0)
    assert planned == plan(prompts, 4000, 10.0, 1.0, 0) != plan(prompts, 4000, 10.0, 1.0, 1)
    gaps = [after.seconds - before.seconds for before, after in pairwise(planned)]
    assert min(gaps) > 0 and sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.1)
    deviation = sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)
    assert deviation == pytest.approx(0.01, rel=0.2)  # exponential
    shares = [sum(request.model == name for request in planned) / 4000 for name in "xyz"]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.03)
    assert [request.messages[0]["content"] for request in planned if request.model == "x"][:4] == [
        "x0",
        "x1",
        "x2",
        "x0",
    ]
