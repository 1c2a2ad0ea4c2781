"""Weights rounded without data a few rows at a time: the very bits of the whole at once."""

from __future__ import annotations

import pytest
import torch

from quantkit.core import data_free, quantize
from quantkit.core.scheme import CHANNEL, QuantSpec

SPECS = {
    "4 bits": QuantSpec(4, 32), "4 bits with zero points": QuantSpec(4, 32, symmetric=False), "3 bits": QuantSpec(3, 64),
    "2 bits a row": QuantSpec(2, CHANNEL), "8 bits a row": QuantSpec(8, CHANNEL), "NF4": QuantSpec(4, 64, kind="nf4"),
    "FP4, the last block filled up": QuantSpec(4, 4096, kind="fp4"),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("search", [True, False], ids=["searched", "range"])
@pytest.mark.parametrize("name", SPECS)
def test_rows_at_a_time_give_the_bits_of_the_whole(name: str, search: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (torch.randn(61, 192, generator=torch.Generator().manual_seed(3)) ** 3).bfloat16()
    monkeypatch.setattr(quantize, "_CHUNK", 1 << 30)
    monkeypatch.setattr(data_free, "_AT_ONCE", 1 << 30)
    whole = data_free.quantize(weight, SPECS[name], torch.bfloat16, search=search)
    again = data_free.to_int8_rows(whole)

    monkeypatch.setattr(data_free, "_AT_ONCE", rows * 192)
    monkeypatch.setattr(quantize, "_CHUNK", 3 * 192)

    assert data_free.quantize(weight, SPECS[name], torch.bfloat16, search=search).equals(whole)
    assert data_free.to_int8_rows(whole).equals(again)
