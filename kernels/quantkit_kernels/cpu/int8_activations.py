"""Integer products of 8-bit activations, one scale a token, by 8-bit weights, one scale a row: exactly, through fbgemm's operator in torch.

The operator quantizes float activations onto one grid that it is told. It is told the whole numbers and given the tokens' codes, so that what it
multiplies are the codes themselves and the sums are exact; tokens' scales are applied after. Without VNNI instructions fbgemm adds pairs of
products in 16 saturating bits, which whole codes overflow: there each code is given as two halves that do not.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

Packed = torch.ScriptObject


def why_not() -> str | None:
    """Why this build of torch has no such operator, or None where it has."""
    return None if "fbgemm" in torch.backends.quantized.supported_engines else "this build of torch has no fbgemm"


def pack(codes: Tensor, scale: Tensor) -> Packed:
    """Codes uint8 [N, K] that mean zero at 128, and scale [N, 1], as fbgemm keeps them: one byte a weight."""
    weight = (codes ^ 0x80).view(torch.int8)
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")
            scales, zeros = scale.double().flatten(), torch.zeros(len(codes), dtype=torch.long)
            return torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0), None)
    finally:
        torch.backends.quantized.engine = engine


def linear(codes: Tensor, scale: Tensor, packed: Packed, *, has_vnni: bool) -> Tensor:
    """float32 [M, N] of tokens' codes, whole numbers from -128 to 127 as floats [M, K], and their scales [M, 1]."""
    codes = codes.float().contiguous()
    if not len(codes):
        return codes.new_empty(0, torch.ops.quantized.linear_unpack(packed)[0].shape[0])
    if has_vnni:
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(codes, 1.0, 128, packed)
    else:
        low = torch.floor(codes / 2)
        halves = torch.cat([low, codes - low])
        low, high = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(halves, 1.0, 64, packed).chunk(2)
        y = low + high
    return y.mul_(scale.float())
