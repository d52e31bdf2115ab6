"""Whose turn it is: those who ask much do not hold up those who ask little."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of several owners: owners take turns, and each one's items come first come, first served.

    owner: whose an item is.
    """

    def __init__(self, owner: Callable[[Item], Hashable]) -> None:
        self.owner = owner
        self._lines: OrderedDict[Hashable, deque[Item]] = OrderedDict()  # of owners with items, the next in turn first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        """In the order in which they would be taken."""
        lines = [iter(line) for line in self._lines.values()]
        while lines:
            left = []
            for line in lines:
                for item in line:
                    yield item
                    left.append(line)
                    break
            lines = left

    def extend(self, items: Iterable[Item]) -> None:
        """Each behind its owner's others; an owner without any is last in turn."""
        for item in items:
            self._lines.setdefault(self.owner(item), deque()).append(item)

    def put_back(self, item: Item) -> None:
        """Make one that was taken the next again."""
        owner = self.owner(item)
        self._lines.setdefault(owner, deque()).appendleft(item)
        self._lines.move_to_end(owner, last=False)

    def take(self, fits: Callable[[Item], bool]) -> Item | None:
        """The next, its owner being last in turn then; None if there is none.

        If the next does not fit nobody else is taken in its place, so that there is room for it some time.
        """
        if not self._lines:
            return None
        owner, line = next(iter(self._lines.items()))
        if not fits(line[0]):
            return None
        item = line.popleft()
        self._lines.move_to_end(owner)
        if not line:
            del self._lines[owner]
        return item

    def drop(self, is_over: Callable[[Item], bool]) -> None:
        """Take out all for which that is true; turns stay as they are."""
        for owner, line in list(self._lines.items()):
            kept = deque(item for item in line if not is_over(item))
            if kept:
                self._lines[owner] = kept
            else:
                del self._lines[owner]
