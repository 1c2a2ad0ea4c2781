"""Codes and scales tuned by gradient descent on what a whole block gives, from where GPTQ stopped.

After SignRound (Cheng et al., arXiv 2309.05516): rounding passes gradients straight through, and what moves is each weight's place among the
codes. Unlike there, the way begins at codes and scales that already hold the layer's own error down, scales move by themselves, and all is
judged with scales and zero points as they will be stored. What a block is and what runs through it is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.core.qtensor import QuantizedTensor, from_grid
from quantkit.core.quantize import Grid, as_groups, stored_scale
from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ

_WITHIN = 0.45
"""How far from a code's middle its weight may start, in steps of the grid: nearer to the edge, noise alone would carry it over."""
_WARM_UP = 0.05


@dataclass(frozen=True, slots=True)
class Tuned:
    """Calibrated rounding whose layers are tuned together, a block at a time. By itself it rounds as GPTQ does, which is where tuning starts.

    Attributes:
        steps: of gradient descent in each block.
        tokens: calibration tokens that one step looks at.
        rate: how far a weight moves among the codes in one step, in steps of the grid; falls to 0 over the steps.
        scale_rate: how far a scale moves in one step, as a share of itself.
        zero_rate: how far a zero point moves in one step, in codes, where the grid has any.
        seed: of the order in which calibration rows are looked at.
    """

    steps: int = 200
    tokens: int = 4096
    rate: float = 0.015
    scale_rate: float = 0.003
    zero_rate: float = 0.01
    seed: int = 0
    needs_calibration = True

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{name} is {value!r}; give a whole number from 1 on, such as {getattr(Tuned, name, 200)}")
        for name in ("rate", "scale_rate", "zero_rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise RecipeError(f"{name} is {value!r}; give a number from 0 to 1, such as 0.01")
        if type(self.seed) is not int:
            raise RecipeError(f"seed is {self.seed!r}; give a whole number")

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        return GPTQ()(weight, spec, scale_dtype, statistics)


class TunedWeight(nn.Module):
    """A quantized weight as a function of what is tuned: each weight's place among the codes, scales as shares of the first ones, zero points.

    Args:
        weight: float32 [N, K], the original.
        start: where tuning begins; its values are the module's until something moves.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        super().__init__()
        self.spec, self._scale_dtype, self._shape = start.spec, start.scale.dtype, start.shape
        self._first_scale = start.scale.float()[..., None]  # [N, G, 1]
        zero = torch.full_like(self._first_scale, self.spec.mid_code) if start.zero is None else start.zero.float()[..., None]
        codes = as_groups(start.codes.float(), self.spec)  # [N, G, g]
        wanted = as_groups(weight, self.spec) / self._first_scale + zero
        self.place = nn.Parameter(torch.clamp(wanted, codes - _WITHIN, codes + _WITHIN))
        self.share = nn.Parameter(torch.ones_like(zero))
        self.zero = nn.Parameter(zero, requires_grad=not self.spec.symmetric)

    def forward(self) -> Tensor:
        """The weight [N, K] as it would be stored, differentiable."""
        codes, grid = self._stored()
        return grid.values(codes).reshape(self._shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        codes, grid = self._stored()
        return from_grid(self.spec, codes.reshape(self._shape), grid, self._scale_dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring back what left the range of codes."""
        for value in (self.place, self.zero):
            value.clamp_(-0.49, self.spec.max_code + 0.49)

    def _stored(self) -> tuple[Tensor, Grid]:
        scale = self._first_scale * self.share
        grid = Grid(_through(scale, stored_scale(scale, self._scale_dtype)), _through(self.zero, torch.round(self.zero)))
        return _through(self.place, torch.round(self.place)), grid


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(context: object, value: Tensor, stepped: Tensor) -> Tensor:
        return stepped.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _through(value: Tensor, stepped: Tensor) -> Tensor:
    """`stepped`, exactly, with the gradient of `value` (straight-through estimator)."""
    return _Through.apply(value, stepped.detach())


def error_by_token(output: Tensor, wanted: Tensor) -> Tensor:
    """||output - wanted||^2 / ||wanted||^2 of each token, float32 [...] for states [..., H].

    Relative, as what follows normalizes every token; a few tokens of huge states would be all that counts otherwise.
    """
    wanted = wanted.float()
    return (output.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-20)


class TuningSteps:
    """Adam over places, scales and zero points, with rates that rise over the first steps and then fall to nothing."""

    def __init__(self, weights: Iterable[TunedWeight], settings: Tuned) -> None:
        self._weights, self._settings, self._taken = list(weights), settings, 0
        rates = {"place": settings.rate, "share": settings.scale_rate, "zero": settings.zero_rate}
        groups = [{"params": [p for w in self._weights if (p := getattr(w, name)).requires_grad], "rate": rate} for name, rate in rates.items()]
        self._adam = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-20)

    def take(self) -> None:
        """Move once along the gradients gathered since the last step."""
        warm = min(1.0, (self._taken + 1) / max(1.0, _WARM_UP * self._settings.steps))
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * warm * (1 - self._taken / self._settings.steps)
        self._adam.step()
        self._adam.zero_grad()
        for weight in self._weights:
            weight.settle()
        self._taken += 1
