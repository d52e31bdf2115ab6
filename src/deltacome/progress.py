"""Progress bars on standard error."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left"
Item = TypeVar("Item")


@contextmanager
def bar(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar with elapsed and estimated time; yields the function that moves it on. In a log it moves less often."""
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=total, desc=description, bar_format=FORMAT, mininterval=interval, file=sys.stderr) as progress:

        def advance(amount: float) -> None:
            progress.update(amount)

        yield advance


def each(items: Iterable[Item], advance: Callable[[float], None]) -> Iterator[Item]:
    """The items, the bar moving on by one after each."""
    for item in items:
        yield item
        advance(1)
