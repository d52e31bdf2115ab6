"""`deltacome benchmark serve`: a load over many tenants, on deltas in one batch and on merged models swapped."""

import asyncio
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch

from deltacome.benchmark.load import Answered, Messages, Planned, drive, lengthen, plan
from deltacome.benchmark.results import Row, Table, save
from deltacome.data import read_examples
from deltacome.errors import DeltacomeError
from deltacome.evaluate.summary import import_pyplot
from deltacome.outputs import new_folder
from deltacome.progress import bar
from deltacome.restore.merging import merge
from deltacome.serve import check_installed

COLUMNS = {
    "system": "system",
    "rate": "requests a second, offered",
    "requests_per_second": "answered",
    "tokens_per_second": "tokens a second",
    "failed": "failed",
    "first_median": "first token, s, median",
    "first_p95": "p95",
    "first_p99": "p99",
    "token_median": "per token, ms, median",
    "token_p95": "p95 ",
    "token_p99": "p99 ",
    "between_median": "between two tokens, ms, median",
    "between_p95": "p95  ",
    "between_p99": "p99  ",
    "cached": "prompt tokens cached, %",
    "swaps": "models loaded",
    "gigabytes": "GB of memory, at most",
    "same": "same answers",
}
DELTAS, DISK = "deltas in one batch", "merged models, swapped from disk"
CACHE = "merged models, swapped from the page cache"  # more memory than counted: the files of all of them
NO_PREFIXES = "deltas in one batch, no prefix cache"
SYSTEMS = {"deltas": DELTAS, "no-prefix-cache": NO_PREFIXES, "disk": DISK, "page-cache": CACHE}
MAIN_SYSTEMS = ("deltas", "disk", "page-cache")
LONG = {"long_first_median": "first token of long prompts, s, median", "long_first_p99": "p99   "}


def benchmark_serve(
    base: str,
    deltas: Mapping[str, str],
    data: Mapping[str, Path],
    output: Path,
    *,
    rates: list[float],
    requests: int,
    new_tokens: int,
    ignore_eos: bool,
    skew: float,
    patience: float,
    chat_template: str | None,
    systems: Sequence[str] = MAIN_SYSTEMS,
    system_words: int = 0,
    long_share: float = 0.0,
    long_words: int = 1500,
    seed: int = 0,
) -> Table:
    """Drive each system with the same requests at each rate; write `serve.json`, `serve.md` and `serve.png`.

    data: prompts of each delta, or under the name "" of all of them. patience: of the swapping server. systems: of
    `SYSTEMS`, by their short names. system_words, long_share and long_words: as for `lengthen`.

    Raises:
        DeltacomeError: if a file or checkpoint is broken, or the output exists.
    """
    import_pyplot()
    check_installed()
    for short in systems:
        if short not in SYSTEMS:
            raise DeltacomeError(f"there is no system {short} to measure; those there are: {', '.join(SYSTEMS)}")
    prompts: dict[str, list[Messages]] = {}
    for name in deltas:
        if name not in data and "" not in data:
            raise DeltacomeError(f"there are no prompts for {name}; give --data {name}=FILE.jsonl, or one for all")
        examples = read_examples(data.get(name, data.get("", Path())))
        prompts[name] = [example.messages for example in examples if example.messages]
        if not prompts[name]:
            raise DeltacomeError(f"the data for {name} holds no prompts, only text")
    plans = {
        rate: lengthen(
            plan(prompts, requests, rate, skew, seed),
            system_words=system_words,
            long_share=long_share,
            long_words=long_words,
            seed=seed,
        )
        for rate in rates
    }
    swaps = {"disk", "page-cache"} & set(systems)
    folders = {name: Path(folder).resolve() for name, folder in deltas.items()}
    with new_folder(output) as folder, TemporaryDirectory(dir=folder) as temporary:
        merged = {name: Path(temporary) / name for name in deltas if swaps}
        with bar("benchmark", len(merged) + len(systems) * len(rates)) as advance:
            for name, place in merged.items():
                merge(base, folders[name], place, torch.float32)  # the dtype that it is computed in: no conversion
                advance(1)
            ways: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
                "deltas": (serve_deltas, (base, folders, chat_template)),
                "no-prefix-cache": (serve_deltas, (base, folders, chat_template, 0)),
                "disk": (_serve_merged, (base, folders, merged, patience, True, chat_template)),
                "page-cache": (_serve_merged, (base, folders, merged, patience, False, chat_template)),
            }
            rows, answers = [], {}
            for short, system in SYSTEMS.items():
                if short not in systems:
                    continue
                run, arguments = ways[short]
                for rate, planned in plans.items():
                    answers[system, rate], more = measure_server(run, arguments, planned, new_tokens, ignore_eos)
                    rows.append({"system": system, "rate": rate, **figures_of(answers[system, rate]), **more})
                    advance(1)
        for row in rows:
            pairs = zip(answers[rows[0]["system"], row["rate"]], answers[row["system"], row["rate"]], strict=True)
            row["same"] = sum(one.text == other.text for one, other in pairs)
        settings: dict[str, Any] = {
            "tenants": len(deltas),
            "requests": requests,
            "new_tokens": new_tokens,
            "ignore_eos": ignore_eos,
            "skew": skew,
            "patience": patience,
            "system_words": system_words,
            "long_share": long_share,
            "long_words": long_words,
        }
        each = [
            {"system": system, "rate": rate, **asdict(answer)}
            for (system, rate), own in answers.items()
            for answer in own
        ]
        title = f"{requests} requests to {len(deltas)} tenants at each rate"
        columns = {**COLUMNS, **LONG} if long_share else COLUMNS
        table = Table(title, columns, rows)
        save(folder, "serve", [table], _plot(answers), **settings, answers=each)
    return table


def serve_deltas(
    port: int, base: str, deltas: Mapping[str, Path], chat_template: str | None, prefixes: int | None = None
) -> None:
    """Run the server of deltas. prefixes: tokens of its prefix cache, if not as many as usual."""
    from deltacome.serve.engine.scheduler import Limits
    from deltacome.serve.server import build, run

    limits = Limits() if prefixes is None else Limits(prefixes=prefixes)
    run(build(base, deltas, chat_template=chat_template, deadline=3600.0, limits=limits), "127.0.0.1", port)


def _serve_merged(
    port: int,
    base: str,
    deltas: Mapping[str, Path],
    merged: Mapping[str, Path],
    patience: float,
    from_disk: bool,
    chat_template: str | None,
) -> None:
    from deltacome.benchmark.swapping import build_swapping
    from deltacome.serve.http.app import create_app
    from deltacome.serve.server import on_a_thread, run

    build = on_a_thread(build_swapping)
    service = build(base, deltas, merged, patience=patience, from_disk=from_disk, chat_template=chat_template)
    run(create_app(service), "127.0.0.1", port)


def measure_server(
    run: Callable[..., None], arguments: tuple[Any, ...], planned: list[Planned], new_tokens: int, ignore_eos: bool
) -> tuple[list[Answered], Row]:
    """The answers of a server of its own, and what it took."""
    hello = ({"role": "user", "content": "Hello"},)
    warm = [Planned(0.0, name, hello) for name in dict.fromkeys(request.model for request in planned)]
    with _server(run, arguments) as (port, process):
        asyncio.run(drive("127.0.0.1", port, warm, 2, ignore_eos))  # everything is loaded and compiled
        before = _loads(port)
        with _memory(process) as most:
            found = asyncio.run(drive("127.0.0.1", port, planned, new_tokens, ignore_eos))
        return found, {"swaps": _loads(port) - before, "gigabytes": round(most[0] / 1e9, 2)}


@contextmanager
def _server(run: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own, when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=run, args=(port, *arguments), daemon=True)
    process.start()
    try:
        while not _is_up(port):
            if not process.is_alive():
                raise DeltacomeError("the server did not start; what it said is above")
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join()


def _is_up(port: int) -> bool:
    try:
        return _get(port, "/health").endswith('{"status":"ok"}')
    except OSError:
        return False


def _get(port: int, path: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer.decode()


def _loads(port: int) -> int:
    """Deltas or models that the server has loaded so far."""
    lines = _get(port, "/metrics").splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("deltacome_delta_loads_total")))


@contextmanager
def _memory(process: psutil.Process) -> Iterator[list[int]]:
    """The most bytes that a process has resident while the block runs."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def figures_of(answers: list[Answered]) -> Row:
    """Of a load: throughput, from the first request to the last answer, and latencies.

    The time to the first token is that of prompts that were not made long; theirs is another figure.
    """
    done = [answer for answer in answers if answer.failed is None]
    if not done:
        raise DeltacomeError(f"no request was answered; the first: {answers[0].failed}")
    seconds = max(answer.ended for answer in answers)
    prompt_tokens = sum(answer.prompt_tokens for answer in done)
    first, long_first = (
        [answer.first for answer in done if answer.first is not None and answer.is_long == is_long]
        for is_long in (False, True)
    )
    between = [1000 * seconds for answer in done for seconds in answer.between]
    each = [1000 * answer.per_token for answer in done if answer.per_token is not None]
    row: Row = {
        "requests_per_second": round(len(done) / seconds, 2),
        "tokens_per_second": round(sum(answer.tokens for answer in done) / seconds, 1),
        "failed": len(answers) - len(done),
        "cached": round(100 * sum(answer.cached_tokens for answer in done) / prompt_tokens),
    }
    figures = (("first", first, 2), ("token", each, 0), ("between", between, 0), ("long_first", long_first, 2))
    for name, values, digits in figures:
        for label, percent in (("median", 50), ("p95", 95), ("p99", 99)) if values else ():
            row[f"{name}_{label}"] = round(float(np.percentile(values, percent)), digits)
    return row


def _plot(answers: dict[tuple[str, float], list[Answered]]) -> Any:
    """The share of requests that have their first token, and their whole answer, after so many seconds."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    rates = sorted({rate for _, rate in answers})
    for (system, rate), own in answers.items():
        done = [answer for answer in own if answer.failed is None]
        style = {
            "linestyle": ("-", "--", ":", "-.")[rates.index(rate) % 4],
            "color": f"C{list(SYSTEMS.values()).index(system)}",
        }
        for place, values in enumerate(([answer.first or 0.0 for answer in done], [answer.last for answer in done])):
            share = np.arange(1, len(done) + 1) / len(own)
            axes[place].step(sorted(values), share, where="post", label=f"{system}, {rate:g}/s", **style)
    for axis, label in zip(axes, ("to the first token", "to the whole answer"), strict=True):
        axis.set(xscale="log", xlabel=f"seconds {label}", ylim=(0, 1.02))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SYSTEMS), fontsize=8)  # hides no data
    return figure
