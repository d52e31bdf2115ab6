"""Thousands of clients that are slow, vanish, or mean no good: answers stay right, and memory flat."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from clients import attack, check_unharmed
from serving import alone, make_app, serving

pytest_plugins = ["serving"]
ROUNDS = 30  # of 300 clients


@pytest.mark.attack
def test_clients(folder: Path, merged: dict[str, tuple[Any, Any]]) -> None:
    app, expected, memory = make_app(folder), alone(merged, "a", "Who?", 8), []
    with serving(app) as address:
        for number in range(ROUNDS):
            attack(address, 300, number, expected)
            check_unharmed(app, address, expected)
            memory.append(psutil.Process().memory_info().rss)
    third = ROUNDS // 3
    grown = sum(memory[-third:]) / third - sum(memory[third : 2 * third]) / third
    print(f"{ROUNDS * 300} clients, memory grew by {grown / 2**20:.1f} MiB")
    assert grown < 20 * 2**20
