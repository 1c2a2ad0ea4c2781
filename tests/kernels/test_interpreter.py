"""The interpreter that the kernel tests rely on computes what the hardware does, on values where it is known to have gone wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _narrow(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _magic(codes_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    bits = tl.load(codes_ptr + at).to(tl.uint16) | 0x4300
    tl.store(y_ptr + at, bits.to(tl.bfloat16, bitcast=True) - 136.0)


@triton.jit
def _product(a_ptr, b_ptr, y_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for i in range(count):
        a = tl.load(a_ptr + i * SIZE * SIZE + at[:, None] * SIZE + at[None, :])
        b = tl.load(b_ptr + i * SIZE * SIZE + at[:, None] * SIZE + at[None, :])
        total += tl.dot(a, b)
    tl.store(y_ptr + at[:, None] * SIZE + at[None, :], total)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_conversions_round_to_nearest_and_8_bit_floats_saturate(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.cat([torch.tensor([-1.977, 1000.0, -1000.0, 0.0, 1e-4, 447.9, 0.0019]), torch.randn(57) * 8]).to(device)
    y = torch.empty(64, dtype=dtype, device=device)

    _narrow[(1,)](x, y, SIZE=64)

    top = torch.finfo(dtype).max
    assert torch.equal(y.float(), x.clamp(-top, top).to(dtype).float())


def test_codes_become_bfloat16_by_their_bits(device: torch.device) -> None:
    codes, y = torch.arange(16, dtype=torch.uint8, device=device), torch.empty(16, dtype=torch.bfloat16, device=device)

    _magic[(1,)](codes, y, SIZE=16)

    assert y.tolist() == list(range(-8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_a_loop_of_unknown_length(dtype: torch.dtype, device: torch.device) -> None:
    a, b = (torch.randn(3, 16, 16, device=device).to(dtype) for _ in range(2))
    y = torch.empty(16, 16, device=device)

    _product[(1,)](a, b, y, 3, SIZE=16)

    torch.testing.assert_close(y, (a.double() @ b.double()).sum(0).float(), rtol=1e-2, atol=1e-2)
