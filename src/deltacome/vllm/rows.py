"""Which rows of a step belong to which adapter, and what the layers worked out for them."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPOSITIONS = 8  # of a batch, the last ones, for which what the layers prepared stays


class Rows:
    """The rows of a matrix by the slot of their adapter.

    Args:
        adapters: the adapter's number of each row, 0 for the base.
        slots: the adapter's number in each slot, None for an empty one.
    """

    def __init__(self, adapters: np.ndarray, slots: Sequence[int | None], device: torch.device) -> None:
        self.count = len(adapters)
        self.by_slot: dict[int, Tensor] = {}
        for slot, adapter in enumerate(slots):
            rows = np.flatnonzero(adapters == adapter) if adapter is not None else ()
            if len(rows):
                self.by_slot[slot] = torch.as_tensor(rows, device=device)
        self._prepared: dict[Any, Any] = {}

    def prepared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when the key was first asked for."""
        if key not in self._prepared:
            self._prepared[key] = make()
        return self._prepared[key]


class Step:
    """The running step: the rows of its tokens, and of those tokens whose logits are asked for.

    slots: whose slot each row is, for layers in CUDA graphs, which have up to `slots.rows` rows; None without graphs.
    """

    def __init__(self, device: torch.device, slots: Any = None) -> None:
        self.device, self.slots = device, slots
        self._sampling: int | np.ndarray | None = None
        self.forget()

    def forget(self) -> None:
        """An adapter came or went: nothing that was worked out holds."""
        self._recent: OrderedDict[bytes, Rows] = OrderedDict()
        self._slots: tuple[int | None, ...] = ()
        self.adapters = np.zeros(0)  # their number of each token
        self.tokens = self.samples = Rows(np.zeros(0), (), self.device)

    def set(self, tokens: Sequence[int], samples: Sequence[int], slots: Sequence[int | None]) -> None:
        """Begin a step, given the adapters' numbers of both, and those in the slots."""
        self._slots, self.adapters = tuple(slots), np.asarray(tokens)
        self.tokens, self.samples = self._rows(np.asarray(tokens)), self._rows(np.asarray(samples))
        if self.slots is not None and len(tokens) <= self.slots.rows:
            of_rows = np.full(len(tokens), len(slots))
            for slot, adapter in enumerate(slots):
                if adapter is not None:
                    of_rows[np.asarray(tokens) == adapter] = slot
            self.slots.set(of_rows)

    def in_graph(self, rows: int) -> bool:
        """Whether a layer that is called with so many rows may be in a CUDA graph, now or as it is captured."""
        return self.slots is not None and rows <= self.slots.rows

    def of_tokens(self, count: int) -> Rows:
        """The rows of the tokens that a layer computes, as many as these are."""
        return self.tokens

    @contextmanager
    def sampling(self, adapters: int | np.ndarray) -> Iterator[None]:
        """While the block runs, logits are asked for of tokens of one adapter, or of these, a number each."""
        self._sampling = adapters
        try:
            yield
        finally:
            self._sampling = None

    def of_logits(self, count: int) -> Rows:
        """The rows of so many tokens whose logits are asked for."""
        return self.samples if self._sampling is None else self._rows(np.full(count, self._sampling))

    def _rows(self, adapters: np.ndarray) -> Rows:
        key = adapters.astype(np.int64).tobytes()  # runner V2 has them in 32 bit
        rows = self._recent.pop(key, None) or Rows(adapters, self._slots, self.device)
        self._recent[key] = rows
        while len(self._recent) > COMPOSITIONS:
            self._recent.popitem(last=False)
        return rows
