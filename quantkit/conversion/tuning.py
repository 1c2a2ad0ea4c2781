"""The layers of one block tuned together, on the block's own error: what it makes of the quantized model's states against what the original
block made of the original ones. The best of what was looked at on all calibration rows is kept, so tuning never ends worse than it started.

In memory at once: the block and the one behind it (or the head), six float32 values a weight (places, their gradients, Adam's two means,
values and what led to them), and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from quantkit.conversion.hidden_states import HiddenStates
from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.plan import Plan
from quantkit.conversion.report import LayerResult
from quantkit.conversion.rounding import finite_weight, relative_error
from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import RecipeError
from quantkit.methods.base import Statistics
from quantkit.methods.tuned import Tuned, TunedWeight, TuningSteps, error_by_token, kl_by_token
from quantkit.models.compare import logit_places
from quantkit.models.experts import skipping_padding
from quantkit.models.streaming import BlockRunner, Place, Weights

_LOOKS = 5
"""How often, over the steps, all calibration rows are looked at."""


def tuning_of(plan: Plan) -> Tuned | None:
    """The settings by which layers are tuned, None where none is.

    Raises:
        RecipeError: rules give different settings; a block is tuned whole.
    """
    settings = {layer.rounding for layer in plan.layers.values() if isinstance(layer.rounding, Tuned)}
    if len(settings) > 1:
        raise RecipeError("rules tune with different settings; the layers of a block are tuned together, so give all rules the same")
    return next(iter(settings), None)


@dataclass(frozen=True, eq=False, slots=True)
class Rounded:
    """A layer as GPTQ left it, with what its error is measured by."""

    layer: LayerPlan
    q: QuantizedTensor
    result: LayerResult
    statistics: Statistics

    def remade(self, q: QuantizedTensor, weight: Tensor) -> tuple[str, QuantizedTensor, LayerResult]:
        return self.result.name, q, replace(self.result, error=relative_error(weight, q.dequantize(), self.statistics))


@dataclass(frozen=True, eq=False, slots=True)
class TunedBlock:
    """One block, its original weights loaded, and the states around it.

    Attributes:
        entering: states that enter it in the quantized model.
        wanted: states that left it in the original model.
    """

    runner: BlockRunner
    index: int
    entering: HiddenStates
    wanted: HiddenStates

    def tune(
        self, layers: Mapping[str, Rounded], modules: Mapping[str, nn.Module], source: Weights, settings: Tuned, told: Callable[[str], None]
    ) -> Iterator[tuple[str, QuantizedTensor, LayerResult]]:
        """Better tensors for the rounded layers, by name as `modules` are; the block's own weights are left as they were."""
        originals = {name: finite_weight(rounded.layer, source) for name, rounded in layers.items()}
        weights = {name: TunedWeight(originals[name].to(self.runner.device), rounded.q) for name, rounded in layers.items()}
        best = {name: rounded.q for name, rounded in layers.items()}
        stored = {modules[name]: _Stored(weights[name], rounded.layer.linear.is_transposed) for name, rounded in layers.items()}
        with self._following(source, settings), _in_place(stored):
            least = first = self._error(settings)
            for step in self._steps(list(weights.values()), settings):
                told(f"tuning block {self.index}: step {step} of {settings.steps}, error {least / first:.3f} of GPTQ's")
                looks = step == settings.steps or step % max(1, settings.steps // _LOOKS) == 0
                if looks and (error := self._error(settings)) < least:
                    least, best = error, {name: weight.quantized() for name, weight in weights.items()}
        for name, rounded in layers.items():
            yield rounded.remade(best[name], originals[name].to(self.runner.device))

    def _steps(self, weights: list[TunedWeight], settings: Tuned) -> Iterator[int]:
        """The number of each step once it is taken."""
        steps = TuningSteps(weights, settings)
        places = self._shuffled(torch.Generator().manual_seed(settings.seed + self.index))
        tokens = min(settings.tokens, self.entering.rows.input_ids.numel())
        for step in range(1, settings.steps + 1):
            seen = 0
            while seen < tokens:
                place = next(places)
                with torch.enable_grad(), self.runner.differentiating():
                    (self._error_of(place, settings) / tokens).backward()
                seen += self.entering.rows.input_ids[place].numel()
            steps.take()
            yield step

    def _shuffled(self, generator: torch.Generator) -> Iterator[Place]:
        places = self.entering.batches(self.runner, self.index)
        while True:
            yield from (places[at] for at in torch.randperm(len(places), generator=generator).tolist())

    def _error(self, settings: Tuned) -> float:
        """Over all calibration rows, with the weights as they are now."""
        with torch.no_grad(), parametrize.cached():
            return sum(float(self._error_of(place, settings)) for place in self.entering.batches(self.runner, self.index))

    def _error_of(self, place: Place, settings: Tuned) -> Tensor:
        """Summed over tokens that are not padding: the block's own, and what follows makes of it."""
        output, wanted = self._through(self.index, self.entering.states[place], place), self.wanted.states[place].to(self.runner.device)
        own = self._sum(error_by_token(output, wanted), place)
        if not settings.ahead:
            return own
        if self._is_last:
            behind = self._divergence(output, wanted, place)
        else:
            with torch.no_grad():
                wanted = self._through(self.index + 1, wanted, place)
            behind = self._sum(error_by_token(self._through(self.index + 1, output, place), wanted), place)
        return (1 - settings.ahead) * own + settings.ahead * behind

    def _divergence(self, output: Tensor, wanted: Tensor, place: Place) -> Tensor:
        """KL of the next-token distributions, a few tokens at a time: their logits are made again for the gradient instead of kept."""
        rows = self.entering.rows
        ids, positions, valid = (each[place] for each in (rows.input_ids, rows.position_ids, rows.valid))

        def divergence(states: Tensor, at: Place) -> Tensor:
            with torch.no_grad():
                original = self.runner.logits(wanted[at], ids[at], positions[at])
            by_token = kl_by_token(original, self.runner.logits(states, ids[at], positions[at]))
            return by_token[valid[at].to(by_token.device)].sum()

        vocabulary = int(self.runner.architecture.config.get_text_config().vocab_size)
        return sum(checkpoint(divergence, output[at], at, use_reentrant=False) for at in logit_places(ids.shape, vocabulary))

    def _sum(self, errors: Tensor, place: Place) -> Tensor:
        return errors[self.entering.rows.valid[place].to(errors.device)].sum()

    def _through(self, index: int, states: Tensor, place: Place) -> Tensor:
        rows = self.entering.rows
        with skipping_padding(self.runner.architecture.blocks[index].module, rows.valid[place]):
            return self.runner.block(index, states, rows.input_ids[place], rows.position_ids[place])

    @property
    def _is_last(self) -> bool:
        return self.index + 1 == len(self.runner.architecture.blocks)

    @contextmanager
    def _following(self, source: Weights, settings: Tuned) -> Iterator[None]:
        """What follows the block with its original weights, where that is looked at."""
        if not settings.ahead:
            yield
        elif self._is_last:
            self.runner.load_outside(source)
            yield
            self.runner.unload_outside()
        else:
            path = self.runner.architecture.blocks[self.index + 1].path
            self.runner.load(path, source)
            yield
            self.runner.unload(path)


class _Stored(nn.Module):
    """A tuned weight in a linear's own type and orientation."""

    def __init__(self, weight: TunedWeight, is_transposed: bool) -> None:
        super().__init__()
        self.weight, self.is_transposed = weight, is_transposed

    def forward(self, original: Tensor) -> Tensor:
        values = self.weight()
        return (values.T if self.is_transposed else values).to(original.dtype)


@contextmanager
def _in_place(stored: Mapping[nn.Module, _Stored]) -> Iterator[None]:
    """Let the linears use these weights."""
    for module, weight in stored.items():
        parametrize.register_parametrization(module, "weight", weight)
    try:
        yield
    finally:
        for module in stored:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
