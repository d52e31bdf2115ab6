"""Keys and values of several sequences of different lengths, which come and go."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # positions that a full layer grows by


class _Layer(DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' cache with room behind the last position, so that a step copies nothing but its own."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.all_keys, self.all_values = (_with_room(x[:, :, :0], x.shape[2]) for x in (key_states, value_states))
        self.show(0)
        self.is_initialized = True

    def show(self, length: int) -> None:
        """Let the first positions be the valid ones."""
        self.length = length
        self.keys, self.values = self.all_keys[:, :, :length], self.all_values[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.all_keys.shape[2]:
            # Of a prompt many parts come: with less room, copying would be quadratic.
            room = ROOM if key_states.shape[2] == 1 else end
            self.all_keys, self.all_values = (_with_room(x, end, room) for x in (self.keys, self.values))
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.show(end)
        return self.keys, self.values


def _with_room(x: Tensor, length: int, room: int = ROOM) -> Tensor:
    """Keys or values (rows, heads, positions, size) at the front of a tensor for `length` positions and some more."""
    rows, heads, positions, size = x.shape
    found = x.new_empty(rows, heads, length + room, size)
    found[:, :, :positions] = x
    return found


def new_cache() -> Cache:
    """An empty cache for one or several sequences, the shorter ones padded on the left."""
    return Cache(layer_class_to_replicate=_Layer)


def rewind(cache: Cache, length: int) -> None:
    """Forget what was written behind the first `length` positions, in some layers or in all of them."""
    for layer in cache.layers:
        layer.show(length)


def bytes_per_position(cache: Cache) -> float:
    """Of the keys and values of all layers."""
    return sum((layer.keys[0].nbytes + layer.values[0].nbytes) / layer.keys.shape[2] for layer in cache.layers)


def states_of(cache: Cache, row: int, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """A copy of each layer's keys and values (1, heads, positions, size) of a row from one position to another."""
    place = slice(row, row + 1), slice(None), slice(start, end)
    return [(layer.keys[place].clone(), layer.values[place].clone()) for layer in cache.layers]


def cache_of(states: Iterable[Sequence[Tensor]]) -> Cache:
    """A cache of each layer's keys and values."""
    cache = new_cache()
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
    return cache


def join(parts: Sequence[tuple[Cache, list[int], int]], length: int) -> Cache:
    """One cache of some rows of several, in that order, for `length` positions, the longest row's.

    A part is a cache, its rows, and its end: positions behind that are left out. What lies further left than `length`
    before its end is padding and dropped; with the end 0 all of a row is padding.
    """
    joined = new_cache()
    for number in range(len(parts[0][0].layers)):
        layers = [cache.layers[number] for cache, _, _ in parts]
        layer = _Layer()
        layer.dtype, layer.device = layers[0].dtype, layers[0].device
        found: list[Tensor] = []
        for kind in ("keys", "values"):
            like: Tensor = getattr(layers[0], kind)
            rows = sum(len(rows) for _, rows, _ in parts)
            whole = like.new_zeros(rows, like.shape[1], length + ROOM, like.shape[3])
            first = 0
            for part, (_, own, end) in zip(layers, parts, strict=True):
                old: Tensor = getattr(part, kind)
                kept = min(length, end)
                source = old[:, :, end - kept : end]
                if own != list(range(old.shape[0])):
                    source = source[torch.tensor(own, device=old.device)]
                whole[first : first + len(own), :, length - kept : length] = source
                first += len(own)
            found.append(whole)
        layer.all_keys, layer.all_values = found
        layer.show(length)
        layer.is_initialized = True
        joined.layers.append(layer)
    return joined
