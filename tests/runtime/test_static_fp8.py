"""FP8 weights and inputs with calibrated scales against an oracle: transformers' model whose linears round their own input at the stored scale.

As with other rounded inputs (test_w8a8), a value at the border of two codes now and then falls to the other one, so tokens are held equal up to the
first place where the two best logits lie nearer than such flips reach; each linear alone is held to the oracle's values.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.runtime.loader import load
from tests.runtime.conftest import dequantized_model, greedy_of, sway_of
from tests.runtime.test_engine import engine, greedy
from tests.runtime.test_w8a8 import first_difference


class StaticLinear(nn.Module):
    """Takes its input to the nearest 8-bit float of `input / scale`, and multiplies in float64."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = weight.double(), scale.float()

    def forward(self, x: Tensor) -> Tensor:
        codes = (x / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.double() @ self.weight.T * self.scale.double()).float()


@pytest.fixture(scope="module", params=["compressed-tensors", "fp8"])
def checkpoint(request: pytest.FixtureRequest, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "out"
    few = CalibrationOptions(num_samples=8, seq_len=128)
    convert(str(reference), folder, ConvertOptions(recipe="fp8-static", format=request.param, calibration=few, measure=False))
    return folder


def oracle(checkpoint: Path) -> nn.Module:
    opened, model = OpenedCheckpoint(checkpoint), dequantized_model(checkpoint)
    assert len(opened.schemes) == 42 and {scheme.name for scheme in opened.schemes.values()} == {"fp8-static"}
    for name in opened.schemes:
        model.set_submodule(name, StaticLinear(opened.get(f"{name}.weight"), opened.reader.get(f"{name}.input_scale")))
    return model


def test_each_linear_gives_the_oracles_values(checkpoint: Path) -> None:
    model, loaded = oracle(checkpoint), load(str(checkpoint), mode="exact", device=torch.device("cpu")).model
    draws = torch.Generator().manual_seed(2)
    for path, linear in model.named_modules():
        if isinstance(linear, StaticLinear):
            x = torch.randn(9, linear.weight.shape[1], generator=draws) * torch.logspace(-2, 2, 9)[:, None] * linear.scale * 448
            expected = linear(x)

            found = loaded.get_submodule(path)(x)

            size = expected.abs().amax(-1, keepdim=True)
            torch.testing.assert_close(found / size, expected / size, rtol=0, atol=2e-6)


def test_greedy_tokens_are_the_oracles(checkpoint: Path, prompts: list[list[int]]) -> None:
    model = oracle(checkpoint)
    expected = [greedy_of(model, prompt, 16) for prompt in prompts[:10]]

    found = greedy(engine(checkpoint), prompts[:10], 16)

    apart = [m for tokens, e in zip(found, expected, strict=True) if (m := first_difference(tokens, e)) is not None]
    sway = sway_of(model, StaticLinear, prompts[:10])
    assert len(apart) <= 3 and all(margin < 2 * sway.logit for margin in apart), (apart, sway)
