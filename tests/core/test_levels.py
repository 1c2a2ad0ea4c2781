"""Every kind of grid against the tools that defined it: the same codes, the same scales, the same values, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from torch import Tensor

from quantkit.core.data_free import quantize
from quantkit.core.dynamic_map import dynamic_map
from quantkit.core.levels import code_of, level_of, nearest_level, table
from quantkit.core.scheme import QuantSpec
from quantkit.core.scheme_names import parse_scheme

KINDS = {
    "e4m3": QuantSpec(8, -1, kind="e4m3"), "e2m1": QuantSpec(4, 32, kind="e2m1"),
    "nf4": QuantSpec(4, 64, kind="nf4"), "fp4": QuantSpec(4, 64, kind="fp4"),
}  # fmt: skip


def weights(rows: int = 48, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_stands_for_itself(kind: str) -> None:
    spec = KINDS[kind]
    codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
    levels = level_of(codes, spec, 0)
    usable = ~levels.isnan()

    assert torch.equal(levels[usable], table(kind)[usable])
    assert torch.equal(nearest_level(levels[usable], spec, 0), levels[usable])
    assert torch.equal(level_of(code_of(levels[usable], spec, 0), spec, 0), levels[usable])


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_level_is_the_nearest_of_all(kind: str) -> None:
    spec, levels = KINDS[kind], table(kind)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * levels.nan_to_num().abs().max() / 2

    nearest = (levels[~levels.isnan()] - x[:, None]).abs().amin(1)

    assert torch.equal((nearest_level(x, spec, 0) - x).abs(), nearest)


def test_halves_of_four_bit_floats_go_to_the_even_code() -> None:
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5])

    assert nearest_level(halves, KINDS["e2m1"], 0).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -2.0]


def test_four_bit_floats_have_the_codes_of_compressed_tensors() -> None:
    levels = nearest_level(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 3, KINDS["e2m1"], 0)
    codes = code_of(levels, KINDS["e2m1"], 0)

    assert torch.equal(codes[:, ::2] | codes[:, 1::2] << 4, pack_fp4_to_uint8(levels))


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(48, 256), (24, 172)], ids=["even rows", "blocks over the ends of rows"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_have_the_codes_and_scales_of_bitsandbytes(kind: str, block: int, shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=block, quant_type=kind)

    q = quantize(weight, QuantSpec(4, block, kind=kind), torch.float32, search=False)

    theirs = torch.stack([packed >> 4, packed & 15], dim=-1).view(shape)
    theirs = torch.where((theirs == 8) & (kind == "fp4"), 0, theirs)  # of FP4's two zeros it takes either
    assert torch.equal(q.codes, theirs)
    assert torch.equal(q.scale, state.absmax)
    assert torch.equal(q.dequantize(), bitsandbytes.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_is_that_of_bitsandbytes(kind: str) -> None:
    weight = weights(96, 512)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)

    q = quantize(weight, parse_scheme(f"{kind}-dq").weight, torch.float32, search=False)

    assert torch.equal(dynamic_map(), state.state2.code)
    assert torch.equal(q.nested.outer, state.state2.absmax) and float(q.nested.offset) == float(state.offset)
    exact = quantize(weight, parse_scheme(kind).weight, torch.float32, search=False).scale
    theirs = q.nested.scales(state.absmax)
    assert (q.scale == state.absmax).float().mean() > 0.99  # on a CPU it looks codes up in a way that misses the nearest at times
    assert bool(((q.scales - exact).abs() <= (theirs - exact).abs()).all())
    q.scale = state.absmax
    assert torch.equal(q.dequantize(), bitsandbytes.dequantize_4bit(packed, state))


def test_rows_of_llm_int8_are_those_of_bitsandbytes() -> None:
    weight = weights()
    codes, row_maximum, _ = bitsandbytes.int8_vectorwise_quant(weight.half())

    q = quantize(weight.half(), parse_scheme("int8").weight, torch.float32, search=False)

    assert torch.equal((q.codes.to(torch.int16) - 128).to(torch.int8), codes)
    assert torch.equal(q.scale[:, 0], row_maximum.float())
    assert torch.equal(q.dequantize(), bitsandbytes.int8_vectorwise_dequant(codes, row_maximum))


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "nvfp4", "mxfp4", "mxfp8", "fp8-dynamic", "fp8-block", "fp8-static", "int8"])
@pytest.mark.parametrize("search", [False, True], ids=["range", "searched"])
def test_a_search_never_loses_more(name: str, search: bool) -> None:
    weight, spec = weights(128, 256), parse_scheme(name).weight
    lost = [(quantize(weight, spec, torch.float32, search=s).dequantize() - weight).square().sum() for s in (False, search)]

    assert lost[1] <= lost[0]
    assert lost[1] / weight.square().sum() < (0.02 if spec.bits == 4 else 0.002)
