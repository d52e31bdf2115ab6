"""Progress bars on standard error."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


@contextmanager
def bar(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar with elapsed and estimated time; yields the function that moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


def each(items: Iterable[Item], advance: Callable[[float], None]) -> Iterator[Item]:
    """The items, the bar moving on by one after each."""
    for item in items:
        yield item
        advance(1)
