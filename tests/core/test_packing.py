from __future__ import annotations

import pytest
import torch

from quantkit.core.packing import pack, pack_whole, packed_words, unpack, unpack_whole


def as_stream(codes: list[int], bits: int) -> list[int]:
    """The definition, in Python integers: element i at bit i*bits, cut into 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(packed_words(len(codes), bits))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 7, 32, 63, 172])
def test_packing_is_one_dense_bit_stream(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.tolist() == [as_stream(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_whole_words_hold_as_many_codes_as_fit(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 77), dtype=torch.uint8)
    words = pack_whole(codes, bits)
    assert words.shape[1] == -(-77 // (32 // bits))
    assert torch.equal(unpack_whole(words, bits, 77), codes)


def test_symmetric_four_bit_zeros_are_the_known_words() -> None:
    sevens = torch.full((1, 8), 7, dtype=torch.uint8)
    assert pack(sevens, 4).item() == 0x77777777
    assert pack(sevens + 1, 4).item() & 0xFFFFFFFF == 0x88888888
