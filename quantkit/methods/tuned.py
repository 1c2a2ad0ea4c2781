"""Codes and scales tuned by gradient descent on what a whole block gives, from where GPTQ stopped.

After SignRound (Cheng et al., arXiv 2309.05516): rounding passes gradients straight through, and what moves is each weight's place among the
codes. Unlike there, the way begins at codes and scales that already hold the layer's own error down, scales move by themselves, and all is
judged with scales and zero points as they will be stored. What a block is and what runs through it is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.core.groups import as_groups, from_groups
from quantkit.core.levels import code_of, level_of, nearest_level, top_level
from quantkit.core.qtensor import LLM_INT8_STEP, QuantizedTensor
from quantkit.core.quantize import Grid, from_grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.given import is_number
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
        ahead: the share of the error that is taken behind the following block, run with its original weights, or as KL behind the head after
            the last one: what is made of an error is what counts. 0 halves the time.
        seed: of the order in which calibration rows are looked at.
    """

    steps: int = 100
    tokens: int = 4096
    rate: float = 0.01
    scale_rate: float = 0.001
    zero_rate: float = 0.01
    ahead: float = 0.5
    seed: int = 0
    needs_calibration = True
    needs_original = True
    needs_drift = False

    def __post_init__(self) -> None:
        for name, example in (("steps", 100), ("tokens", 4096)):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{name} is {value!r}; give a whole number from 1 on, such as {example}")
        for name in ("rate", "scale_rate", "zero_rate", "ahead"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise RecipeError(f"{name} is {value!r}; give a number from 0 to 1, such as 0.01")
        if type(self.seed) is not int:
            raise RecipeError(f"seed is {self.seed!r}; give a whole number")

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        return GPTQ()(weight, spec, scale_dtype, statistics)


class TunedWeight(nn.Module):
    """A quantized weight as a function of what is tuned: each weight's place among the codes, scales as shares of the first ones, zero points.

    Scales that are stored through those of other groups, or as a row's largest magnitude, stay as they are.

    Args:
        weight: float32 [N, K], the original.
        start: where tuning begins; its values are the module's until something moves.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        super().__init__()
        self.spec, self._start = start.spec, start
        groups = as_groups(weight, self.spec)  # [R, G, g]
        self._first_scale = start.scales.reshape(*groups.shape[:2], 1)
        zero = torch.full_like(self._first_scale, _zero(self.spec)) if start.zero is None else start.zero.float()[..., None]
        levels = as_groups(level_of(start.codes, self.spec, _zero(self.spec) if start.zero is None else start.expand(start.zero).float()), self.spec)
        wanted = groups / (self._first_scale * self._unit)
        if self.spec.kind == "int":
            place = torch.clamp(wanted, levels - _WITHIN, levels + _WITHIN)
        else:
            place = torch.where(nearest_level(wanted, self.spec, 0.0) == levels, wanted, levels)
        self.place = nn.Parameter(place + zero)
        self.share = nn.Parameter(torch.ones_like(zero), requires_grad=self.spec.scale not in ("nested", "row maximum"))
        self.zero = nn.Parameter(zero, requires_grad=not self.spec.symmetric)

    @property
    def step(self) -> float:
        """From one code to the next: 1 for integers, an average for grids whose steps differ."""
        return 1.0 if self.spec.kind == "int" else 2 * top_level(self.spec) / self.spec.max_code

    def forward(self) -> Tensor:
        """The weight [N, K] as it would be stored, differentiable."""
        levels, grid = self._stored()
        return from_groups(grid.values(levels) * self._unit, self.spec, self._start.shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        levels, grid = self._stored()
        levels = from_groups(levels, self.spec, self._start.shape)
        if not self.share.requires_grad:
            return replace(self._start, codes=code_of(levels, self.spec, _zero(self.spec)))
        return from_grid(self.spec, levels, grid, self._scale_type)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring back what left the range of codes."""
        low, high = (-0.49, self.spec.max_code + 0.49) if self.spec.kind == "int" else (-top_level(self.spec), top_level(self.spec))
        self.place.clamp_(low, high)
        self.zero.clamp_(low, high)

    def _stored(self) -> tuple[Tensor, Grid]:
        """Levels [R, G, g] and their grid."""
        scale, zero = self._first_scale * self.share, _through(self.zero, torch.round(self.zero))
        if self.share.requires_grad:
            scale = _through(scale, self._scale_type.stored(scale))
        level = self.place - zero
        return _through(level, nearest_level(level, self.spec, zero)), Grid(scale, zero)

    @property
    def _scale_type(self) -> ScaleType:
        if self._start.divisor is not None:
            return ScaleType(self._start.scale.dtype, float(self._start.divisor))
        return ScaleType(self._start.scale.dtype)

    @property
    def _unit(self) -> float:
        return LLM_INT8_STEP if self.spec.scale == "row maximum" else 1.0


def _zero(spec: QuantSpec) -> float:
    """The code that means zero in a symmetric grid of integers; levels of floats are counted from zero."""
    return float(spec.mid_code) if spec.kind == "int" else 0.0


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


def kl_by_token(original: Tensor, quantized: Tensor) -> Tensor:
    """KL(original || quantized) in nats of each token, float32 [...] for logits [..., V]."""
    log_p, log_q = original.log_softmax(-1), quantized.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class TuningSteps:
    """Adam over places, scales and zero points, with rates that rise over the first steps and then fall to nothing."""

    def __init__(self, weights: Iterable[TunedWeight], settings: Tuned) -> None:
        self._weights, self._settings, self._taken = list(weights), settings, 0
        groups = [{"params": [weight.place], "rate": settings.rate * weight.step} for weight in self._weights]
        for name, rate in (("share", settings.scale_rate), ("zero", settings.zero_rate)):
            groups += [{"params": [value], "rate": rate} for weight in self._weights if (value := getattr(weight, name)).requires_grad]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-20)

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
