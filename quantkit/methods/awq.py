"""Activation-aware scales (AWQ: Lin et al., arXiv 2306.00978): inputs that are large get columns that round finely.

Inputs are divided by a scale and columns multiplied by it. The scale of least error is searched among powers of the inputs' mean size over powers
of the columns' mean size, and then polished. The error is that of the outputs, exactly: with D the difference that rounding makes to the
weight, ||D X||^2 = tr(D H D^T), so no activations are kept. The polish follows the gradient of the error that rounding to nearest is expected to
make: a column's errors are as wide as its group's step over its scale; it is taken as far as it lowers the true error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.scheme import CHANNEL, QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.base import Reader, Rounding
from quantkit.methods.clip import ClippedToNearest
from quantkit.methods.rtn import RoundToNearest

_WIDEST = 1e4
"""No scale is this much larger than another: what is folded must be held by half precision."""

_JUDGED = 4
"""Scales of a search that are rounded as their weights will be; those that rounding to nearest likes best."""


@dataclass(frozen=True, slots=True)
class AWQ:
    """Attributes:
        grid: exponents tried for the inputs' size, from 0 to 1.
        duo: try for each also the columns' size to the rest of the exponent, below the line.
        polish: steps of gradient descent after the search; 0 for none.
        clip: search a smaller range of each group where the rounding searches none.
        rows: weights of about so many outputs are looked at, spread over all.
    """

    grid: int = 20
    duo: bool = True
    polish: int = 100
    clip: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        for name, least in (("grid", 1), ("polish", 0), ("rows", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RecipeError(f"{name} is {value!r}; give a whole number from {least} on")
        for name in ("duo", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; give true or false")

    def scale(self, readers: Sequence[Reader], index: Tensor, count: int) -> Tensor:
        """See Transform. A scale of ones is among those tried, so the error is never above that of no transform, on the rows looked at."""
        readers = [_fewer_rows(reader, self.rows * len(readers), sum(len(r.weight) for r in readers)) for reader in readers]
        index = index.to(readers[0].weight.device)
        ones = torch.ones(count, device=index.device)
        found = _least(readers, index, self._candidates(readers, index, count), (ones, error(readers, ones[index])))
        best, _ = _least(readers, index, self._polished(readers, index, found[0]), found)
        return best

    def rounding(self, rounding: Rounding) -> Rounding:
        return ClippedToNearest() if self.clip and isinstance(rounding, RoundToNearest) else rounding

    def _candidates(self, readers: Sequence[Reader], index: Tensor, count: int) -> Iterator[Tensor]:
        inputs, columns = _mean_input(readers, index, count).log(), _mean_column(readers, index, count).log()
        for step in range(self.grid + 1):
            ratio = step / self.grid
            for rest in (0.0, 1 - ratio) if self.duo else (0.0,):
                if ratio or rest:
                    yield normalised(ratio * inputs - rest * columns)

    def _polished(self, readers: Sequence[Reader], index: Tensor, scale: Tensor) -> Iterator[Tensor]:
        logarithm = scale.log().requires_grad_()
        optimizer = torch.optim.Adam([logarithm], lr=0.02)
        for step in range(self.polish):
            optimizer.zero_grad()
            with torch.enable_grad():
                expected_error(readers, logarithm.exp()[index]).log().backward()
            optimizer.step()
            if step % 10 == 9:
                yield normalised(logarithm.detach())


def _least(readers: Sequence[Reader], index: Tensor, candidates: Iterable[Tensor], known: tuple[Tensor, float]) -> tuple[Tensor, float]:
    """The scale of least error and that error, among the known one and the candidates.

    Rounding to nearest, which costs a tenth of a rounding that searches, picks the few that are judged by their own rounding.
    """
    nearest = [replace(reader, rounding=RoundToNearest()) for reader in readers]
    ranked = sorted(candidates, key=lambda candidate: error(nearest, candidate[index]))
    return min([known, *((candidate, error(readers, candidate[index])) for candidate in ranked[:_JUDGED])], key=lambda pair: pair[1])


def error(readers: Sequence[Reader], scale: Tensor) -> float:
    """The squared error of all outputs over the tokens seen, with inputs divided by a scale [K]: tr(D H D^T)."""
    total = 0.0
    for reader in readers:
        scaled = reader.statistics.divided(scale)
        rounded = reader.rounding(reader.weight * scale, reader.spec, reader.scale_dtype, scaled).dequantize() / scale
        difference = rounded - reader.weight
        total += float(((difference @ reader.statistics.hessian) * difference).sum()) * reader.statistics.num_tokens
    return total


def expected_error(readers: Sequence[Reader], scale: Tensor) -> Tensor:
    """What `error` is for errors without a pattern: step² / 12 a weight of its group, each by its input's mean square."""
    total = torch.zeros((), device=scale.device)
    for reader in readers:
        scaled = _row_groups(reader.weight * scale, reader.spec)
        span = 2 * scaled.abs().amax(-1) if reader.spec.symmetric else scaled.amax(-1).clamp(min=0) - scaled.amin(-1).clamp(max=0)
        noise = _row_groups((reader.statistics.hessian.diagonal() / scale.square())[None], reader.spec).sum(-1)
        total = total + (span.square() * noise).sum() * reader.statistics.num_tokens
    return total


def normalised(logarithm: Tensor) -> Tensor:
    """The scale of these logarithms, about 1: the smallest and the largest are each other's inverse, and not too far apart."""
    middle = (logarithm.max() + logarithm.min()) / 2
    bound = torch.log(torch.tensor(_WIDEST)).item() / 2
    return (logarithm - middle).clamp(-bound, bound).exp()


def _row_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] as [N, G, g]; a whole row where groups span rows."""
    return as_groups(weight, QuantSpec(bits=8, group=CHANNEL) if spec.spans_rows else spec)


def _fewer_rows(reader: Reader, wanted: int, there: int) -> Reader:
    step = 1 if reader.spec.spans_rows else max(1, there // wanted)
    return replace(reader, weight=reader.weight[::step]) if step > 1 else reader


def _mean_input(readers: Sequence[Reader], index: Tensor, count: int) -> Tensor:
    """[count], the mean size of the inputs under each scale, over readers by their tokens; never 0."""
    tokens = sum(reader.statistics.num_tokens for reader in readers)
    sizes = [reader.statistics.mean_size * (reader.statistics.num_tokens / tokens) for reader in readers if reader.statistics.mean_size is not None]
    return _gathered(torch.stack(sizes).sum(0), index, count).clamp(min=1e-5)


def _mean_column(readers: Sequence[Reader], index: Tensor, count: int) -> Tensor:
    """[count], the mean size of the weights under each scale, each as a share of its group's largest; never 0."""
    shares = [(groups.abs() / groups.abs().amax(-1, keepdim=True).clamp(min=1e-12)).reshape(reader.weight.shape)
              for reader in readers for groups in (_row_groups(reader.weight, reader.spec),)]  # fmt: skip
    return _gathered(torch.cat(shares).mean(0), index, count).clamp(min=1e-5)


def _gathered(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The mean of the values [K] under each scale; [count]."""
    zeros = torch.zeros(count, device=values.device)
    return zeros.index_add(0, index, values) / zeros.index_add(0, index, torch.ones_like(values)).clamp(min=1)
