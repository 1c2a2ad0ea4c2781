"""Two stored weights are the same where every float32 bit is, and else as far apart as plain arithmetic says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.core.difference import difference
from quantkit.core.quantize import rounded
from quantkit.core.scheme_names import parse_scheme


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-asym-g32", "fp8-block", "fp8-tensor", "nf4-dq", "nvfp4", "int8"])
@pytest.mark.parametrize("shape", [(128, 128), (1280, 128)], ids=str)
def test_a_weight_is_the_same_as_itself_and_not_as_one_code_off(scheme: str, shape: tuple[int, int]) -> None:
    spec = parse_scheme(scheme).weight
    q = rounded(torch.randn(shape, generator=torch.Generator().manual_seed(3)), spec, torch.float16, search=False)
    codes = q.codes.clone()
    codes[-1, -1] ^= 1
    off = replace(q, codes=codes)

    assert difference(q, replace(q, codes=q.codes.clone())).is_none
    found = difference(q, off)

    w, v = q.dequantize(), off.dequantize()
    assert not found.is_none and found.is_finite
    assert found.largest == pytest.approx(float((w - v).abs().max()), rel=1e-6)
    assert found.relative == pytest.approx(float((w - v).square().sum() / w.square().sum()), rel=1e-4)


def test_zeros_of_unlike_signs_are_not_the_same_bits() -> None:
    assert not difference(torch.zeros(2, 2), -torch.zeros(2, 2)).is_none


def test_nan_is_found_wherever_it_lies() -> None:
    weight = torch.zeros(1300, 4)
    weight[1299, 3] = torch.nan

    assert not difference(weight, weight).is_finite
