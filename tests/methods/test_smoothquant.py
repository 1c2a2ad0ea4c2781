"""Smoothing: the paper's formula, channels that share a scale by their largest, and settings that cannot be."""

from __future__ import annotations

import pytest
import torch

from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.base import Reader, Statistics
from quantkit.methods.rtn import RoundToNearest
from quantkit.methods.smoothquant import SmoothQuant


def reader(seed: int) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(50, 8, generator=generator), torch.randn(4, 8, generator=generator)
    return Reader(weight, Statistics(x.T @ x / 50, 50, x.abs().mean(0), x.abs().amax(0)), QuantSpec(8, -1), RoundToNearest(), torch.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_scale_is_the_paper_s(alpha: float) -> None:
    one = reader(0)

    scale = SmoothQuant(alpha=alpha).scale([one], torch.arange(8), 8)

    expected = [float(one.statistics.largest[k]) ** alpha / float(one.weight[:, k].abs().max()) ** (1 - alpha) for k in range(8)]
    torch.testing.assert_close(scale, torch.tensor(expected))


def test_shared_scales_and_several_readers_go_by_the_largest() -> None:
    one, two, index = reader(0), reader(1), torch.tensor([0, 1, 2, 3] * 2)

    scale = SmoothQuant().scale([one, two], index, 4)

    x = torch.maximum(one.statistics.largest, two.statistics.largest).view(2, 4).amax(0)
    w = torch.cat([one.weight, two.weight]).abs().amax(0).view(2, 4).amax(0)
    torch.testing.assert_close(scale, (x / w).sqrt())


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "half", True])
def test_impossible_settings_are_refused(alpha: object) -> None:
    with pytest.raises(RecipeError, match="alpha is"):
        SmoothQuant(alpha=alpha)
