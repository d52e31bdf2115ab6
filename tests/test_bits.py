import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome.format.bits import BIT_WIDTHS, pack, planes, unpack, words_per_row


@settings(deadline=None, max_examples=200)
@given(bits=st.sampled_from(BIT_WIDTHS), rows=st.integers(0, 5), length=st.integers(0, 200), seed=st.integers(0, 999))
def test_round_trip(bits: int, rows: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, length), generator=generator, dtype=torch.int32)
    words = pack(codes, bits)
    assert words.shape == (rows, words_per_row(length, bits)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, length), codes)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_layout_is_the_documented_one(bits: int) -> None:
    """Bit by bit with Python integers, as docs/format.md describes the planes."""
    length = 45
    codes = np.random.default_rng(bits).integers(0, 2**bits, length)
    expected = []
    for first, width in planes(bits):
        words = [0] * -(-length // (32 // width))
        for j, code in enumerate(codes):
            words[j // (32 // width)] |= (int(code) >> first & (2**width - 1)) << width * (j % (32 // width))
        expected += words
    packed = pack(torch.tensor(codes)[None], bits)[0].numpy().view(np.uint32)
    assert packed.tolist() == expected


def test_planes() -> None:
    assert planes(3) == [(0, 2), (2, 1)]
    assert planes(7) == [(0, 4), (4, 2), (6, 1)]
    assert [planes(bits) for bits in (1, 2, 4, 8, 16)] == [[(0, bits)] for bits in (1, 2, 4, 8, 16)]


def test_bytes_are_what_the_bit_width_says() -> None:
    for bits in BIT_WIDTHS:
        assert words_per_row(4096, bits) * 32 == 4096 * bits


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit in 2 bits"):
        pack(torch.tensor([[0, code]]), 2)


def test_wrong_word_count_is_refused() -> None:
    with pytest.raises(ValueError, match="words a row"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 2, 20)
    with pytest.raises(ValueError, match="no codes of 9 bits"):
        words_per_row(10, 9)
