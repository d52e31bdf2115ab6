"""Turns in the server's queue."""

import random
from collections import Counter, deque

import pytest

from deltacome.serve.engine.queue import FairQueue


def make(items: str = "") -> FairQueue[str]:
    """Of items such as "a1", which is of a."""
    queue: FairQueue[str] = FairQueue(lambda item: item[0])
    queue.extend(items.split())
    return queue


def drain(queue: FairQueue[str]) -> str:
    taken = []
    while (item := queue.take(lambda _: True)) is not None:
        taken.append(item)
    assert len(queue) == 0
    return " ".join(taken)


@pytest.mark.parametrize(
    ("came", "taken"),
    [
        ("", ""),
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1 c1 c2", "a1 b1 c1 a2 c2 a3"),
        ("b1 a1 b2 a2", "b1 a1 b2 a2"),
    ],
)
def test_owners_take_turns(came: str, taken: str) -> None:
    queue = make(came)
    assert len(queue) == len(came.split()) and " ".join(queue) == taken
    assert drain(queue) == taken


def test_who_comes_later_waits_for_one_of_each_and_not_for_all() -> None:
    queue = make(" ".join(f"a{i}" for i in range(9)))
    assert [queue.take(lambda _: True) for _ in range(3)] == ["a0", "a1", "a2"]
    queue.extend(["b0", "b1"])
    assert drain(queue) == "a3 b0 a4 b1 a5 a6 a7 a8"


def test_who_does_not_fit_is_next_until_it_does() -> None:
    queue = make("a1 b1 a2")
    assert queue.take(lambda item: item != "a1") is None and " ".join(queue) == "a1 b1 a2"
    first = queue.take(lambda _: True)
    assert first == "a1"
    queue.put_back(first)
    assert drain(queue) == "a1 b1 a2"
    queue.put_back("c1")
    assert drain(queue) == "c1"


def test_what_is_dropped_leaves_the_turns_as_they_are() -> None:
    queue = make("a1 b1 c1 a2 b2")
    queue.drop(lambda item: item in ("a1", "c1"))
    assert drain(queue) == "a2 b1 b2"


def test_nothing_is_lost_and_nobody_waits_longer_than_a_round() -> None:
    numbers = random.Random(0)
    queue, waiting, since = make(), {name: deque() for name in "abcd"}, Counter()
    for step in range(2000):
        if numbers.random() < 0.5:
            name = numbers.choice("aaaaabcd")
            waiting[name].append(f"{name}{step}")
            queue.extend([waiting[name][-1]])
        elif (item := queue.take(lambda _: True)) is not None:
            assert item == waiting[item[0]].popleft()
            since = Counter({name: since[name] + 1 for name in "abcd" if waiting[name] and name != item[0]})
            assert max(since.values(), default=0) <= 3
        assert len(queue) == sum(map(len, waiting.values()))
