"""Codes of any width packed into 32-bit words as one dense little-endian bit stream, and back.

Element i of a row occupies bits [i*bits, (i+1)*bits) of the row's stream; word w holds stream bits [32w, 32w+32). For 2, 4 and 8 bits this is
the usual "low bits first" packing; for 3 bits it equals GPTQ's three-word pattern; for 3, 5 and 6 bits it is compressed-tensors' packing
since mid-2026. Words are int32 bit patterns, as the containers store them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CODES_PER_PERIOD = 32
_BYTE_WIDTHS = (1, 2, 4, 8)
"""Widths whose codes never cross a byte: they are packed into bytes, four of which are a word on a little-endian machine."""


def packed_words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: integer tensor [..., K] with values in [0, 2**bits).

    Returns:
        int32 [..., ceil(K * bits / 32)].
    """
    if bits in _BYTE_WIDTHS:
        return _pack_bytes(codes, bits)
    *lead, count = codes.shape
    periods = -(-count // _CODES_PER_PERIOD)
    padded = codes.new_zeros((*lead, periods * _CODES_PER_PERIOD), dtype=torch.int64)
    padded[..., :count] = codes
    padded = padded.view(*lead, periods, _CODES_PER_PERIOD)
    words = padded.new_zeros((*lead, periods, bits))
    for i in range(_CODES_PER_PERIOD):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= (padded[..., i] << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - offset)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).view(*lead, periods * bits)[..., : packed_words(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        words: int32 [..., W] with W >= ceil(count * bits / 32).

    Returns:
        uint8 [..., count].
    """
    if bits in _BYTE_WIDTHS:
        return _unpack_bytes(words, bits, count)
    *lead, width = words.shape
    periods = -(-count // _CODES_PER_PERIOD)
    padded = words.new_zeros((*lead, periods * bits), dtype=torch.int64)
    used = min(width, periods * bits)
    padded[..., :used] = words[..., :used].to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(*lead, periods, bits)
    codes = torch.empty((*lead, periods, _CODES_PER_PERIOD), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(_CODES_PER_PERIOD):
        word, offset = divmod(i * bits, 32)
        value = padded[..., word] >> offset
        if offset + bits > 32:
            value = value | (padded[..., word + 1] << (32 - offset))
        codes[..., i] = (value & mask).to(torch.uint8)
    return codes.view(*lead, periods * _CODES_PER_PERIOD)[..., :count].contiguous()


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    *lead, count = codes.shape
    padded = codes.to(torch.uint8)
    if count % (32 // bits):
        padded = torch.nn.functional.pad(padded, (0, -count % (32 // bits)))
    slots = padded.reshape(*lead, -1, 8 // bits)
    packed = slots[..., 0].clone()
    for i in range(1, 8 // bits):
        packed |= slots[..., i] << (i * bits)
    return packed.contiguous().view(torch.int32)


def _unpack_bytes(words: Tensor, bits: int, count: int) -> Tensor:
    packed = words.contiguous().view(torch.uint8)
    codes = torch.stack([(packed >> (i * bits)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-1)
    return codes.flatten(-2)[..., :count].contiguous()


def pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Pack 32 // bits codes into each word and leave the rest of it empty, as compressed-tensors did at 3, 5 and 6 bits before mid-2026."""
    *lead, count = codes.shape
    per_word = 32 // bits
    width = -(-count // per_word)
    padded = codes.new_zeros((*lead, width * per_word), dtype=torch.int64)
    padded[..., :count] = codes
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (padded.view(*lead, width, per_word) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_whole(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_whole`: uint8 [..., count]."""
    shifts = torch.arange(32 // bits, device=words.device) * bits
    codes = (words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8).contiguous()
