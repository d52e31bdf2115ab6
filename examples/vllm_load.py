"""Load for vLLM's server: deltas against the other ways to serve fine-tunes with it, on the same cores, in one run.

    python vllm_load.py BASE --tenant math=MATH=MATH_DELTA --tenant intent=INTENT=INTENT_DELTA \\
        --data prompts.jsonl -o OUT

Ways: deltas in one server; PEFT adapters of a rank, extracted from the fine-tunes' linear weights, in one server of
stock vLLM; merged models, one in memory at a time (the server reads another's weights in place of its own whenever
requests want it); merged models, a server each, all at once. Each gets the same requests, which come at random times.
Where there are to be more tenants than were given, these are taken again, under other names and from other folders.
What was measured is kept in the output folder: a run that was ended goes on. To be run where both vLLM and deltacome
are installed.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from deltacome.benchmark.load import Answered, Planned, drive, plan
from deltacome.benchmark.results import Row, Table, digest, save, store, stored
from deltacome.benchmark.serve import figures_of
from deltacome.data import read_examples
from deltacome.restore.merging import DTYPES, merge
from vllm_benchmark import extract

HOST, MODEL = "127.0.0.1", "model"
COLUMNS = {
    "tenants": "tenants",
    "rate": "requests a second, offered",
    "way": "way",
    "requests_per_second": "answered",
    "tokens_per_second": "tokens a second",
    "first_median": "first token, s, median",
    "first_p95": "p95",
    "token_median": "per token, ms, median",
    "token_p95": "p95 ",
    "swaps": "models loaded",
    "gigabytes": "GB of memory, at most",
    "others": "cores that others used",
}
SHORT = ({"role": "user", "content": "a"},)  # for what comes before the measurement
STOCK = {"VLLM_PLUGINS": ""}
NOT_KEPT_BY = ("output", "tenants", "ranks", "servers")  # arguments that say what is measured, not how
Driver = Callable[[list[Planned]], Coroutine[Any, Any, list[Answered]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--tenant", action="append", required=True, metavar="NAME=FINETUNED=DELTA")
    parser.add_argument("--data", required=True, help="prompts")
    parser.add_argument("--tenants", default="1,4,16", help="how many, one after another")
    parser.add_argument("--rates", default="1,4", help="requests a second, one after another")
    parser.add_argument("--ranks", default="64,256", help="of the PEFT adapters, one after another")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument(
        "--patience", type=float, default=5.0, help="seconds before a swap that others may have to wait"
    )
    parser.add_argument("--servers", type=int, default=4, help="that there is memory for at once")
    parser.add_argument("--chat-template")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

    prompts = [example.messages for example in read_examples(arguments.data, arguments.requests)]
    rates = [float(rate) for rate in arguments.rates.split(",")]
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in NOT_KEPT_BY}
    rows: list[Row] = []
    for count in map(int, arguments.tenants.split(",")):
        tenants = make_tenants(arguments, count)
        ways: dict[str, Callable[..., Any]] = {"deltas, one server": serve_deltas}
        for rank in map(int, arguments.ranks.split(",")):
            ways[f"PEFT adapters of rank {rank}, one server"] = lambda *given, rank=rank: serve_adapters(*given, rank)
        ways["merged models, swapped"] = serve_swapped
        if 1 < count <= arguments.servers:
            ways["merged models, a server each"] = serve_each
        plans = [plan(dict.fromkeys(tenants, prompts), arguments.requests, rate, 0.0, arguments.seed) for rate in rates]
        for way, serve in ways.items():
            place = arguments.output / "kept" / f"{count}-{way.replace(' ', '-').replace(',', '')}.json"
            what = digest([settings, count, way])
            kept = stored(place, what)
            if kept is None:
                kept = {"rows": measure(serve, arguments, tenants, plans, rates)}
                store(place, what, kept)
            rows += [{"tenants": count, "way": way, **row} for row in kept["rows"]]
            print(*(f"{count} tenants, {way}: {row}" for row in kept["rows"]), sep="\n", flush=True)
    rows.sort(key=lambda row: (row["tenants"], row["rate"]))
    title = f"{arguments.requests} requests at each rate, {arguments.new_tokens} new tokens each"
    save(arguments.output, "vllm", [Table(title, COLUMNS, rows)], **settings)
    shutil.rmtree(arguments.output / "made")


@dataclass(frozen=True)
class Tenant:
    """A fine-tune, its delta, and the folder for what else is made of it."""

    name: str
    finetuned: str
    delta: Path
    folder: Path


def make_tenants(arguments: argparse.Namespace, count: int) -> dict[str, Tenant]:
    """So many tenants, each with a folder of its own for its delta."""
    given = [item.split("=") for item in arguments.tenant]
    found = {}
    for number, (name, finetuned, delta) in enumerate(itertools.islice(itertools.cycle(given), count)):
        name = name if number < len(given) else f"{name}-{number // len(given)}"
        folder = (arguments.output / "made" / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        link(Path(delta), folder / "delta")
        found[name] = Tenant(name, finetuned, folder / "delta", folder)
    return found


def link(folder: Path, other: Path) -> None:
    """The same files under another path, which vLLM takes for others."""
    if not other.exists():
        other.mkdir()
        for path in folder.iterdir():
            (other / path.name).hardlink_to(path)


def measure(
    serve: Callable[..., Any], arguments: argparse.Namespace, tenants: dict[str, Tenant], plans: Any, rates: list[float]
) -> list[Row]:
    """The figures of one way at each rate."""
    with ExitStack() as stack, asyncio.Runner() as runner:
        driver, processes, swaps = serve(stack, arguments, tenants)
        warm = driver([Planned(0.0, name, SHORT) for name in tenants])
        check(runner.run(warm))  # everything is loaded and compiled
        rows = []
        for rate, planned in zip(rates, plans, strict=True):
            before, start, others = swaps(), time.perf_counter(), work_of_others(processes)
            with memory_of(processes) as most:
                answers = runner.run(driver(planned))
            others = (work_of_others(processes) - others) / (time.perf_counter() - start)
            check(answers)
            more = {"swaps": swaps() - before, "gigabytes": round(most[0] / 1e9, 2), "others": round(others, 2)}
            rows.append({"rate": rate, **figures_of(answers), **more})
    return rows


def check(answers: list[Answered]) -> None:
    failed = [answer.failed for answer in answers if answer.failed]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed; the first: {failed[0]}")


def no_swaps() -> int:
    return 0


def serve_deltas(stack: ExitStack, arguments: argparse.Namespace, tenants: dict[str, Tenant]) -> Any:
    deltas = [f"--delta={name}={tenant.delta}" for name, tenant in tenants.items()]
    command = ["-m", "deltacome.cli", "serve", arguments.base, "--engine", "vllm", *deltas, "--name", MODEL]
    port, process = stack.enter_context(server(arguments, [*command, "--dtype", arguments.dtype], ["--"], {}))
    return one_server(port, arguments), [process], no_swaps


def serve_adapters(stack: ExitStack, arguments: argparse.Namespace, tenants: dict[str, Tenant], rank: int) -> Any:
    made: dict[str, Path] = {}
    for tenant in tenants.values():
        folder = tenant.folder / f"rank-{rank}"
        if tenant.finetuned in made:
            link(made[tenant.finetuned], folder)
        elif not folder.exists():
            extract(Path(arguments.base), tenant.finetuned, folder, arguments.dtype, rank)
        made.setdefault(tenant.finetuned, folder)
    slots = ["--max-loras", str(len(tenants)), "--max-lora-rank", str(rank)]
    adapters = ["--lora-modules", *(f"{name}={tenant.folder}/rank-{rank}" for name, tenant in tenants.items())]
    stock = stock_vllm(arguments, arguments.base)
    port, process = stack.enter_context(server(arguments, stock, ["--enable-lora", *slots, *adapters], STOCK))
    return one_server(port, arguments), [process], no_swaps


def serve_each(stack: ExitStack, arguments: argparse.Namespace, tenants: dict[str, Tenant]) -> Any:
    """One thread each: more threads than cores in all would be slower."""
    environment = {**STOCK, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    started = {
        name: stack.enter_context(server(arguments, stock_vllm(arguments, merged(arguments, tenant)), [], environment))
        for name, tenant in tenants.items()
    }

    async def driver(planned: list[Planned]) -> list[Answered]:
        each = [
            one_server(port, arguments)([replace(one, model=MODEL) for one in planned if one.model == name])
            for name, (port, _) in started.items()
        ]
        return list(itertools.chain(*await asyncio.gather(*each)))

    return driver, [process for _, process in started.values()], no_swaps


def serve_swapped(stack: ExitStack, arguments: argparse.Namespace, tenants: dict[str, Tenant]) -> Any:
    folders = {name: merged(arguments, tenant) for name, tenant in tenants.items()}
    environment = {**STOCK, "VLLM_SERVER_DEV_MODE": "1"}  # for `reload_weights`
    stock = stock_vllm(arguments, next(iter(folders.values())))
    port, process = stack.enter_context(server(arguments, stock, [], environment))
    turns = Turns(port, folders, arguments.patience)
    ask = one_server(port, arguments)

    async def driver(planned: list[Planned]) -> list[Answered]:
        start = time.perf_counter()

        async def one(request: Planned) -> Answered:
            await asyncio.sleep(request.seconds)
            came = time.perf_counter()
            async with turns.of(request.model):
                waited = time.perf_counter() - came
                (answer,) = await ask([Planned(0.0, MODEL, request.messages)])
            first = None if answer.first is None else waited + answer.first
            return replace(answer, first=first, last=waited + answer.last, ended=time.perf_counter() - start)

        return list(await asyncio.gather(*map(one, planned)))

    return driver, [process], lambda: turns.swaps


@dataclass
class Turns:
    """Whose turn it is on a server with one model in memory, by the rule of `SwappingEngine`.

    The model that is in memory gets all its requests until the oldest of another's has waited for `patience` seconds;
    then what runs ends, and that one's model takes its place.
    """

    port: int
    folders: dict[str, str]
    patience: float
    current: str | None = None
    running: int = 0
    swaps: int = 0
    waiting: list[tuple[float, str]] = field(default_factory=list)  # since when, and for which model
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        async with self.changed:
            self.waiting.append(own := (time.monotonic(), name))
            await self.changed.wait_for(lambda: self._may_begin(own))
            self.waiting.remove(own)
            if name != self.current:
                body = {"method": "reload_weights", "kwargs": {"weights_path": self.folders[name]}}
                await asyncio.to_thread(post, self.port, "/collective_rpc", body)
                self.current, self.swaps = name, self.swaps + 1
                self.changed.notify_all()
            self.running += 1
        try:
            yield
        finally:
            async with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def _may_begin(self, own: tuple[float, str]) -> bool:
        others = [one for one in self.waiting if one[1] != self.current]
        is_late = bool(others) and time.monotonic() - others[0][0] > self.patience
        if own[1] == self.current:
            return not is_late
        return self.running == 0 and own is others[0] and (is_late or len(others) == len(self.waiting))


def post(port: int, path: str, body: Any) -> None:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()


def one_server(port: int, arguments: argparse.Namespace) -> Driver:
    return lambda planned: drive(HOST, port, planned, arguments.new_tokens, ignore_eos=True)


def merged(arguments: argparse.Namespace, tenant: Tenant) -> str:
    folder = tenant.folder / "merged"
    if not folder.exists():
        merge(arguments.base, tenant.delta, folder, DTYPES[arguments.dtype])
    return str(folder)


def stock_vllm(arguments: argparse.Namespace, model: str) -> list[str]:
    own = ["--model", model, "--served-model-name", MODEL, "--dtype", arguments.dtype]
    return ["-m", "vllm.entrypoints.openai.api_server", *own]


@contextmanager
def server(
    arguments: argparse.Namespace, command: list[str], more: list[str], environment: dict[str, str]
) -> Iterator[tuple[int, psutil.Process]]:
    """A server's port and process, when it answers; the same settings for all."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    template = ["--chat-template", arguments.chat_template] if arguments.chat_template else []
    same = ["--max-model-len", "1024", "--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    words = [sys.executable, *command, "--host", HOST, "--port", str(port), *template, *more, *same]
    with (arguments.output / "server.log").open("wb") as log:
        started = subprocess.Popen(words, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
    process = psutil.Process(started.pid)
    try:
        while not is_up(port):
            if started.poll() is not None:
                raise SystemExit(f"a server did not start; {arguments.output / 'server.log'} says why")
            time.sleep(0.2)
        yield port, process
    finally:
        all_of_it = [*process.children(recursive=True), process] if process.is_running() else []
        started.terminate()
        psutil.wait_procs(all_of_it, timeout=20)
        for one in all_of_it:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        started.wait()


def is_up(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://{HOST}:{port}/health").status == 200)
    except OSError:
        return False


def all_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for process in processes for one in (process, *process.children(recursive=True))]


def work_of_others(processes: list[psutil.Process]) -> float:
    """Seconds that cores have worked so far for other programs than the servers and this one."""
    times = psutil.cpu_times()
    own = [one.cpu_times() for one in (psutil.Process(), *all_of(processes))]
    return float(times.user + times.nice + times.system - sum(one.user + one.system for one in own))


@contextmanager
def memory_of(processes: list[psutil.Process]) -> Iterator[list[int]]:
    """The most bytes that servers have in memory while the block runs, what they share counted once."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            most[0] = max(most[0], sum(one.memory_full_info().pss for one in all_of(processes)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


if __name__ == "__main__":
    main()
