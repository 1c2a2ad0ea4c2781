"""Linears of low-bit weights on processors: every kernel against the float product of the weights that it was given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from quantkit_kernels import reference
from quantkit_kernels.cpu import int4_linear, int8_activations, int8_linear
from torch import Tensor
from torch.nn import functional

BFLOAT16_TOLERANCE = 1e-2
needs_fbgemm = pytest.mark.skipif(int8_activations.why_not() is not None, reason="no fbgemm")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def weights(rows: int, columns: int, groups: int = 1, top: int = 256) -> tuple[Tensor, Tensor]:
    """Codes over their whole range and scales of several sizes."""
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(rows, groups, generator=generator) * 0.02 + 1e-4


@pytest.mark.parametrize("fast_bfloat16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 70])
def test_8_bit_weights_multiply_as_their_values_do(tokens: int, fast_bfloat16: bool) -> None:
    codes, scale = weights(48, 96)
    x = torch.randn(tokens, 96)

    y = int8_linear.linear(x, *int8_linear.pack(codes, scale), fast_bfloat16=fast_bfloat16)

    assert y.dtype == x.dtype and int8_linear.why_not(48, 96) is None
    assert error(y, x.double() @ ((codes.double() - 128) * scale).T) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("shape", [(24, 96), (48, 80)])
def test_8_bit_weights_of_other_shapes_are_refused(shape: tuple[int, int]) -> None:
    assert f"{shape[0]} x {shape[1]}" in str(int8_linear.why_not(*shape))


@needs_fbgemm
@pytest.mark.parametrize("has_vnni", [True, False], ids=["vnni", "halves"])
@pytest.mark.parametrize("shape", [(1, 64), (33, 63), (130, 257), (64, 5000)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
def test_integer_products_are_exact(tokens: int, shape: tuple[int, int], has_vnni: bool) -> None:
    """Sums are whole numbers: what is left is the rounding of a float32 result by its two scales."""
    if has_vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("no VNNI")
    codes, scale = weights(*shape)
    x = torch.randint(-128, 128, (tokens, shape[1])).float()
    token_scale = torch.rand(tokens, 1)

    y = int8_activations.linear(x, token_scale, int8_activations.pack(codes, scale), has_vnni=has_vnni)

    expected = (x.double() @ (codes.double() - 128).T) * scale[:, 0].double() * token_scale.double()
    assert y.shape == expected.shape
    assert not tokens or error(y, expected) < 2e-7


@needs_fbgemm
def test_whole_codes_of_the_largest_size_do_not_saturate_in_halves() -> None:
    """fbgemm told to use AVX2 adds pairs of products in 16 bits; whole codes show that it does, halves that they fit."""
    program = (
        "import torch; from quantkit_kernels.cpu import int8_activations as k\n"
        "codes = torch.tensor([[255] * 64, [0] * 64], dtype=torch.uint8); x = torch.tensor([[127.0] * 64, [-128.0] * 64])\n"
        "packed = k.pack(codes, torch.ones(2, 1)); expected = x @ (codes.float() - 128).T\n"
        "print([torch.equal(k.linear(x, torch.ones(2, 1), packed, has_vnni=v), expected) for v in (True, False)])"
    )
    env = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, True]"


@needs_fbgemm
def test_packing_leaves_torch_as_it_was() -> None:
    before = torch.backends.quantized.engine
    int8_activations.pack(*weights(16, 32))
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("columns", [1, 63, 64])
def test_nibbles_come_back(columns: int) -> None:
    codes, _ = weights(5, columns, top=16)
    packed = reference.pack_nibbles(codes)
    assert packed.shape == (5, -(-columns // 2)) and torch.equal(reference.unpack_nibbles(packed, columns), codes)


@pytest.mark.parametrize("zeros", ["one", "per group"])
@pytest.mark.parametrize("columns", [60, 63, 1])
@pytest.mark.parametrize("is_packed", [True, False], ids=["nibbles", "bytes"])
def test_the_reference_multiplies_by_codes_less_zeros_times_scales(
    is_packed: bool, columns: int, zeros: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_WEIGHTS_AT_ONCE", 100)
    group = -(-columns // 4)
    codes, scale = weights(9, columns, groups=-(-columns // group), top=16)
    zero: Tensor | int = 8 if zeros == "one" else torch.randint(0, 16, scale.shape, dtype=torch.int16)
    x = torch.randn(3, columns)

    y = reference.low_bit_linear(x, reference.pack_nibbles(codes) if is_packed else codes, scale, zero, None, functional.linear)

    of = torch.arange(columns) // group
    expected = (codes.double() - (zero if isinstance(zero, int) else zero[:, of].double())) * scale[:, of]
    torch.testing.assert_close(y.double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)


def test_4_bit_weights_packed_in_slices_are_those_packed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = weights(208, 64, groups=2, top=16)
    whole, _ = int4_linear.pack(codes, scale, 8)

    monkeypatch.setattr(int4_linear, "ROWS_AT_ONCE", 64)
    packed, scales = int4_linear.pack(codes, scale, 8)

    assert torch.equal(packed, whole)
    x = torch.randn(3, 64)
    expected = x.double() @ ((codes.double() - 8) * scale.repeat_interleave(32, dim=1)).T
    assert error(int4_linear.linear(x, packed, scales, 32), expected) < BFLOAT16_TOLERANCE
