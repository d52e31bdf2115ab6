"""Keys and values of what prompts begin with, kept for the next request of the same model."""

from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from deltacome.runtime.tenant import Tenant
from deltacome.serve.engine.cache import cache_of, states_of
from deltacome.serve.engine.sequence import Sequence

BLOCK = 16  # tokens that are kept and found together


class _Node:
    """Some tokens behind those of its ancestors. states: of each layer keys and values (1, heads, tokens, size)."""

    def __init__(self, parent: "_Node | None", tokens: tuple[int, ...], states: list[tuple[Tensor, Tensor]]) -> None:
        self.parent, self.tokens, self.states = parent, tokens, states
        self.children: dict[tuple[int, ...], _Node] = {}


class Prefixes:
    """Blocks of tokens whose keys and values are known, a tree for each model and owner; for the engine's thread.

    A delta that was loaded anew, or another in its place, is another `Tenant` and finds nothing of the old one; nor
    does an owner of another's, whose time to the first token would tell what was asked before. What was not used for
    longest goes first.

    limit: tokens that there is room for.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._base = Tenant("", None, {})  # in the place of None
        self._trees: WeakKeyDictionary[Tenant, dict[Hashable, _Node]] = WeakKeyDictionary()
        self._used: OrderedDict[_Node, None] = OrderedDict()  # the longest unused first, children before parents

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return len(self._used) * BLOCK

    def recall(self, sequence: Sequence) -> None:
        """Let a sequence begin behind what is known of its tokens, if that is more than it has read."""
        found = self._find(sequence, len(sequence.tokens) - 1)  # one is read in any case, for its logits
        length = len(found) * BLOCK
        if length <= sequence.read:
            return
        layers = zip(*(node.states for node in found), strict=True)
        sequence.cache = cache_of([[torch.cat(parts, 2) for parts in zip(*layer, strict=True)] for layer in layers])
        if not sequence.made:
            sequence.recalled += length - sequence.read
        sequence.read = length

    def known(self, sequence: Sequence) -> int:
        """How many of its first tokens a sequence need not read."""
        return max(sequence.read, BLOCK * len(self._find(sequence, len(sequence.tokens) - 1)))

    def keep(self, sequence: Sequence, cache: Cache, row: int) -> None:
        """Keep what a sequence has read, whose keys and values a row of a cache ends with."""
        length = min(sequence.read, self.limit)
        path = self._find(sequence, length)
        padding = cache.get_seq_length() - sequence.read
        node = path[-1] if path else self._tree(sequence)
        for start in range(len(path) * BLOCK, length - BLOCK + 1, BLOCK):
            tokens = tuple(sequence.tokens[start : start + BLOCK])
            states = states_of(cache, row, padding + start, padding + start + BLOCK)
            child = node.children[tokens] = _Node(node, tokens, states)
            path.append(child)
            node = child
        self._use(path)
        while self.tokens > self.limit:
            oldest, _ = self._used.popitem(last=False)
            if oldest.parent is not None:
                del oldest.parent.children[oldest.tokens]

    def forget(self, tenant: Tenant | None) -> None:
        """Find nothing of a model any more: an answer has failed, and what it has read may be to blame."""
        self._trees.pop(tenant or self._base, None)

    def _tree(self, sequence: Sequence) -> _Node:
        trees = self._trees.setdefault(sequence.tenant or self._base, {})
        return trees.setdefault(sequence.owner, _Node(None, (), []))

    def _find(self, sequence: Sequence, most: int) -> list[_Node]:
        """The blocks that a sequence's tokens begin with, `most` tokens at most."""
        node, found = self._tree(sequence), []
        for start in range(0, most - BLOCK + 1, BLOCK):
            child = node.children.get(tuple(sequence.tokens[start : start + BLOCK]))
            if child is None:
                break
            found.append(child)
            node = child
        self._use(found)
        return found

    def _use(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)
