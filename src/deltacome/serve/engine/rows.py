"""Sequences whose keys and values are in one cache, and which of them are better in another."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import Cache

from deltacome.runtime.batch import Batch
from deltacome.serve.engine.cache import join
from deltacome.serve.engine.sequence import Sequence


@dataclass(eq=False)
class Rows:
    """Sequences whose keys and values are in one cache. batch: their tenants, once a step has needed it."""

    sequences: list[Sequence] = field(default_factory=list)
    cache: Cache | None = None
    batch: Batch | None = None

    @property
    def length(self) -> int:
        """Positions of the cache."""
        return max((sequence.read for sequence in self.sequences), default=0)


Part = tuple[Rows, list[int]]  # some rows of a cache


def joined(parts: list[Part]) -> Rows:
    """Some rows of each part, in that order; the parts stay as they are."""
    rows = Rows([part.sequences[row] for part, own in parts for row in own])
    caches = [(part.cache, own, part.cache.get_seq_length()) for part, own in parts if own and part.cache is not None]
    rows.cache = join(caches, rows.length) if caches else None
    return rows


def arranged(parts: list[Part], spare: float) -> list[Rows]:
    """The rows of those parts as `partition` has them; what stays together is not copied."""
    found = []
    for group in partition((part.sequences[row] for part, own in parts for row in own), spare):
        members = set(group)
        chosen = [(part, [row for row in own if part.sequences[row] in members]) for part, own in parts]
        chosen = [(part, own) for part, own in chosen if own]
        is_whole = len(chosen) == 1 and len(chosen[0][1]) == len(chosen[0][0].sequences)
        found.append(chosen[0][0] if is_whole else joined(chosen))
    return found


def partition(sequences: Iterable[Sequence], spare: float) -> list[list[Sequence]]:
    """Sequences that share a cache, the longest first, none of which has more than `spare` positions of padding."""
    groups: list[list[Sequence]] = []
    padding = 0
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.tokens), reverse=True):
        more = len(groups[-1][0].tokens) - len(sequence.tokens) if groups else 0
        if groups and padding + more <= spare:
            groups[-1].append(sequence)
            padding += more
        else:
            groups.append([sequence])
            padding = 0
    return groups


def cache_positions(sequences: Iterable[Sequence], spare: float) -> int:
    """Positions of the caches that hold them."""
    return sum(len(group) * len(group[0].tokens) for group in partition(sequences, spare))
