"""Progress bars on standard error, and warnings between them."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left"
Item = TypeVar("Item")
_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def bar(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar with elapsed and estimated time; yields the function that moves it on.

    In a log it moves less often. A bar inside another is part of a step of that one's and is not shown.
    """
    inside = _inside.get()
    token = _inside.set(True)
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(
        total=total, desc=description, bar_format=FORMAT, mininterval=interval, file=sys.stderr, disable=inside
    ) as progress:

        def advance(amount: float) -> None:
            progress.update(amount)

        try:
            yield advance
        finally:
            _inside.reset(token)


def each(items: Iterable[Item], advance: Callable[[float], None]) -> Iterator[Item]:
    """The items, the bar moving on by one after each."""
    for item in items:
        yield item
        advance(1)


def print_warning(message: str) -> None:
    """Warn on standard error, on a line of its own whatever bar is there."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
