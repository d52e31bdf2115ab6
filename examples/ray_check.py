"""Compress on a Ray cluster of two nodes on this machine, kill a worker midway, and compare with a local run.

python ray_check.py BASE FINETUNED OUTPUT [--ratio 16]
"""

import argparse
import threading
import time
from pathlib import Path

import psutil
import torch
from ray.cluster_utils import Cluster

from deltacome import compress
from deltacome.compression.journal import work_folder
from deltacome.files import sha256


def kill_a_worker(folder: Path, start: float) -> None:
    """When a hundred weights are there, kill a process that is at work on another."""
    found: list[psutil.Process] = []
    while not found:
        time.sleep(0.05)
        if len(list(folder.glob("*.safetensors"))) > 100:
            processes = psutil.process_iter(["cmdline"])
            found = [process for process in processes if "ray::_run" in str(process.info["cmdline"])]
    found[0].kill()
    print(f"{time.perf_counter() - start:6.1f} s  killed process {found[0].pid}, one of {len(found)} at work")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetuned", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ratio", type=float, default=16)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True)
    torch.set_num_threads(1)  # as many as each of the nodes has cores
    start = time.perf_counter()
    compress(arguments.base, arguments.finetuned, arguments.output / "local", ratio=arguments.ratio)
    print(f"{time.perf_counter() - start:6.1f} s  done locally, on one thread")

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.connect()
    out = arguments.output / "ray"
    start = time.perf_counter()
    threading.Thread(target=kill_a_worker, args=(work_folder(out), start), daemon=True).start()
    compress(arguments.base, arguments.finetuned, out, ratio=arguments.ratio, engine="ray")
    print(f"{time.perf_counter() - start:6.1f} s  done on two nodes of a core each")

    for name in ("delta.safetensors", "deltacome.json"):
        print(name, *(sha256(arguments.output / place / name)[:16] for place in ("local", "ray")))


if __name__ == "__main__":
    main()
