"""Integers, each in a context, to 16-bit words and back, in about as few as their statistics allow: rANS (Duda, 2013).

`docs/format.md` describes the code. Numba compiles the loops; words come from anywhere, so each is looked for first.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

PRECISION = 12  # the frequencies of a context sum to 2 to the power of this
SMALL = 8  # integers below this are tokens of their own; of others a token has the length and two bits below the first
TOKENS = SMALL + 4 * 61  # for integers of up to 64 bits
LEAST_STATE = 2**16

Integers = NDArray[np.uint64]
Contexts = NDArray[np.uint8]
Frequencies = NDArray[np.uint16]
Words = NDArray[np.uint16]


def count_tokens(values: Integers, contexts: Contexts, context_count: int) -> Frequencies:
    """How often each token comes in each context, scaled to sums of 2**PRECISION: (contexts, tokens up to the last)."""
    counts = np.zeros((context_count, TOKENS), np.int64)
    _count(values, contexts, counts)
    counts = counts[:, : 1 + int(np.flatnonzero(counts.any(0)).max(initial=0))]
    totals = counts.sum(1, keepdims=True)
    scaled = np.where(counts > 0, np.maximum(counts * 2**PRECISION // np.maximum(totals, 1), 1), 0)
    for row, total in zip(scaled, totals[:, 0], strict=True):
        while total and row.sum() != 2**PRECISION:  # the most frequent token gives or takes what rounding has left
            most = row.argmax()
            row[most] = max(row[most] + 2**PRECISION - row.sum(), (row[most] + 1) // 2)
    return scaled.astype(np.uint16)


def encode(values: Integers, contexts: Contexts, frequencies: Frequencies) -> Words:
    """The words of some integers; every token has a frequency in its context."""
    words = np.empty(6 * len(values) + 2, np.uint16)  # a token takes a word at most, and 61 bits below it take four
    return words[_encode(values, contexts, frequencies, _starts(frequencies), words) :].copy()


def decode(words: Words, contexts: Contexts, frequencies: Frequencies) -> Integers:
    """As many integers as there are contexts.

    Raises:
        ValueError: if these are not the words of so many integers.
    """
    if not np.isin(frequencies.sum(1, dtype=np.int64), (0, 2**PRECISION)).all() or frequencies.shape[1] > TOKENS:
        raise ValueError("the frequencies of a context have another sum than they must")
    tokens = np.zeros((len(frequencies), 2**PRECISION), np.uint8)
    for context in np.flatnonzero(frequencies.any(1)):
        tokens[context] = np.repeat(np.arange(frequencies.shape[1]), frequencies[context])
    values = np.empty(len(contexts), np.uint64)
    if not _decode(words, contexts, frequencies, _starts(frequencies), tokens, values):
        raise ValueError("the words end too early, or too late")
    return values


def _starts(frequencies: Frequencies) -> Frequencies:
    """The sums of the frequencies before each."""
    return (np.cumsum(frequencies, 1, dtype=np.int64) - frequencies).astype(np.uint16)


@njit(cache=True, error_model="numpy")
def _split(value):  # type: ignore[no-untyped-def]
    """An integer's token, and how many of its bits are not in it."""
    length = 0
    rest = value
    for step in (32, 16, 8, 4, 2, 1):
        if rest >> np.uint64(step):
            rest >>= np.uint64(step)
            length += step
    if length < 3:
        return np.int64(value), 0
    return SMALL + 4 * (length - 3) + np.int64((value >> np.uint64(length - 2)) & np.uint64(3)), length - 2


@njit(cache=True, error_model="numpy")
def _count(values, contexts, counts):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        counts[contexts[i], _split(values[i])[0]] += 1


@njit(cache=True, error_model="numpy")
def _encode(values, contexts, frequencies, starts, words):  # type: ignore[no-untyped-def]
    """Fill `words` from the end, the last integer first; where the words begin."""
    state = np.uint64(LEAST_STATE)
    at = len(words)
    for i in range(len(values) - 1, -1, -1):
        token, left = _split(values[i])
        while left:  # the bits that are decoded last are the highest, so they come first
            count = (left - 1) % 16 + 1
            left -= count
            if state >> np.uint64(32 - count):
                at -= 1
                words[at] = state & np.uint64(0xFFFF)
                state >>= np.uint64(16)
            bits = (values[i] >> np.uint64(left)) & np.uint64((1 << count) - 1)
            state = (state << np.uint64(count)) | bits
        frequency, start = np.uint64(frequencies[contexts[i], token]), np.uint64(starts[contexts[i], token])
        if state >= frequency << np.uint64(32 - PRECISION):
            at -= 1
            words[at] = state & np.uint64(0xFFFF)
            state >>= np.uint64(16)
        quotient = np.uint64(np.uint32(state) // np.uint32(frequency))
        state = (quotient << np.uint64(PRECISION)) + (state - quotient * frequency) + start
    words[at - 1] = state >> np.uint64(16)
    words[at - 2] = state & np.uint64(0xFFFF)
    return at - 2


@njit(cache=True, error_model="numpy")
def _decode(words, contexts, frequencies, starts, tokens, values):  # type: ignore[no-untyped-def]
    """Fill `values`; whether the words were just those of so many."""
    if len(words) < 2:
        return False
    state = np.uint64(words[0]) | (np.uint64(words[1]) << np.uint64(16))
    at = 2
    for i in range(len(values)):
        slot = state & np.uint64((1 << PRECISION) - 1)
        token = np.int64(tokens[contexts[i], slot])
        frequency, start = np.uint64(frequencies[contexts[i], token]), np.uint64(starts[contexts[i], token])
        state = frequency * (state >> np.uint64(PRECISION)) + slot - start
        if state < np.uint64(LEAST_STATE):
            if at == len(words):
                return False
            state = (state << np.uint64(16)) | np.uint64(words[at])
            at += 1
        if token < SMALL:
            values[i] = token
            continue
        length = 3 + (token - SMALL) // 4
        value = np.uint64(4 + (token - SMALL) % 4) << np.uint64(length - 2)
        done, left = 0, int(length - 2)
        while left:
            count = left if left < 16 else 16
            value |= (state & np.uint64((1 << count) - 1)) << np.uint64(done)
            state >>= np.uint64(count)
            done += count
            left -= count
            if state < np.uint64(LEAST_STATE):
                if at == len(words):
                    return False
                state = (state << np.uint64(16)) | np.uint64(words[at])
                at += 1
        values[i] = value
    return at == len(words) and state == np.uint64(LEAST_STATE)
