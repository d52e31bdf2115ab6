"""Seconds of several ways to do a thing, taken in turns; on a GPU each is a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]


def captured(run: Run, device: torch.device) -> Run:
    """On a GPU, what replays a graph of `run`, so that starting its kernels from Python does not count; else itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(kept: Run = run) -> None:  # which has the tensors that the graph reads
        graph.replay()

    return replay


def measure(ways: Mapping[str, Run], rounds: int, advance: Callable[[float], None]) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count.

    Every way is measured in every round, so that a slow spell of the machine meets them all.
    """
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for number in range(rounds + 1):
        for key, run in ways.items():
            _synchronize()
            started = time.perf_counter()
            run()
            _synchronize()
            if number:
                seconds[key].append(time.perf_counter() - started)
        advance(bool(number))
    return seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written ones together, of a large copy."""
    source = torch.zeros(2**26 if device.type == "cpu" else 2**29, device=device)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, 7, lambda _: None)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
