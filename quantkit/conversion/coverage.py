"""Which experts calibration reached: tokens that routers sent to each, and those that got too few to say anything of their inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from quantkit.checkpoint.weight_files import some
from quantkit.conversion.report import LayerResult
from quantkit.conversion.rounding import MIN_TOKENS
from quantkit.models.experts import expert_of


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Calibration tokens sent to the quantized experts of one block.

    Attributes:
        layer: what the experts are of, such as "model.layers.0.mlp".
        below: names of experts that got fewer than the threshold.
    """

    layer: str
    num_experts: int
    minimum: int
    median: float
    maximum: int
    below: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Coverage:
    """The same of a whole model.

    Attributes:
        threshold: tokens below which an expert's inputs count as unseen.
        saw_all: every expert was calibrated on all tokens, whoever they were sent to.
    """

    threshold: int
    saw_all: bool
    layers: list[RoutedTokens]

    @property
    def below(self) -> list[str]:
        return [name for layer in self.layers for name in layer.below]

    def summary(self) -> str:
        """One line for a person."""
        count, least = sum(layer.num_experts for layer in self.layers), min(layer.minimum for layer in self.layers)
        typical = median(layer.median for layer in self.layers)
        parts = [f"{count:,} experts in {len(self.layers)} layers were sent {least:,} tokens at least, {typical:,.0f} typically"]
        if self.below:
            parts.append(f"{len(self.below):,} fewer than {self.threshold}: {some(self.below)}")
        parts.append("all were calibrated on every token" if self.saw_all else "each was calibrated on its own tokens")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"summary": self.summary()} | asdict(self)


def coverage(layers: Iterable[LayerResult], *, saw_all: bool) -> Coverage | None:
    """What the layers' own accounts say; None where there are no experts, or none was calibrated."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for layer in layers:
        expert = expert_of(layer.name)
        if expert is not None and layer.routed_tokens is not None:
            counts[expert.rpartition(".experts.")[0]][expert] = layer.routed_tokens
    found = [
        RoutedTokens(name, len(each), min(each.values()), median(each.values()), max(each.values()), [e for e, n in each.items() if n < MIN_TOKENS])
        for name, each in counts.items()
    ]
    return Coverage(MIN_TOKENS, saw_all, found) if found else None
