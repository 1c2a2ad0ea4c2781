"""A checkpoint's layer errors by block and kind, from the account that its conversion left; other tools leave none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Literal

from quantkit.report.schema import CheckpointResult, LayerError, Report

ErrorsOf = Literal["outputs", "weights"]
OUTSIDE = "outside"
"""The block of layers that are in none."""


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """The layers of one checkpoint.

    Attributes:
        of: what errors are of, see `errors_of`.
        kinds, blocks: in the order of the model.
        layers: by kind and block; of experts the worst.
    """

    name: str
    of: ErrorsOf
    kinds: list[str]
    blocks: list[str]
    layers: dict[tuple[str, str], LayerError]


@dataclass(frozen=True, slots=True)
class Heat:
    """A logarithmic scale of errors, one for all checkpoints of a report whose errors are of the same and can be compared."""

    low: float
    high: float

    @classmethod
    def of(cls, grids: Iterable[LayerGrid]) -> Heat:
        errors = [layer.error for grid in grids for layer in grid.layers.values() if layer.error > 0]
        return cls(min(errors, default=1.0), max(errors, default=1.0))

    def __call__(self, error: float) -> float:
        """From 0 for the lowest error to 1 for the highest."""
        if error <= self.low or self.high <= self.low:
            return 0.0
        return min(1.0, log(error / self.low) / log(self.high / self.low))


def layer_grid(checkpoint: CheckpointResult) -> LayerGrid | None:
    """None of a checkpoint without an account of what its quantization lost."""
    worst: dict[tuple[str, str], LayerError] = {}
    for layer in known_layers(checkpoint):
        block, kind = place(layer.name)
        if (kind, block) not in worst or worst[kind, block].error < layer.error:
            worst[kind, block] = layer
    if not worst:
        return None
    blocks = sorted({block for _, block in worst}, key=lambda block: (block == OUTSIDE, int(block) if block != OUTSIDE else 0))
    return LayerGrid(checkpoint.name, errors_of(checkpoint), list(dict.fromkeys(kind for kind, _ in worst)), blocks, worst)


def errors_of(checkpoint: CheckpointResult) -> ErrorsOf:
    """A calibrated layer's error is of its outputs, weighted by what it was seen to read; another's is of its weights, and is no measure of those."""
    return "outputs" if any(layer.seen_tokens is not None for layer in known_layers(checkpoint)) else "weights"


def by_depth(checkpoint: CheckpointResult) -> list[tuple[int, float]]:
    """Each block's number, and its layers' mean error."""
    errors: dict[int, list[float]] = defaultdict(list)
    for layer in known_layers(checkpoint):
        block, _ = place(layer.name)
        if block != OUTSIDE:
            errors[int(block)].append(layer.error)
    return [(block, fmean(found)) for block, found in sorted(errors.items())]


def worst_layers(checkpoint: CheckpointResult, count: int) -> list[LayerError]:
    """The first one is the worst."""
    return sorted(known_layers(checkpoint), key=lambda layer: -layer.error)[:count]


def known_layers(checkpoint: CheckpointResult) -> list[LayerError]:
    """Those whose error is beside the original: none where a quantized one was moved, whose account is beside that."""
    made = checkpoint.conversion
    return made.layers if made is not None and made.recipe is not None else []


def unaccounted(report: Report) -> list[str]:
    """Names of checkpoints that nothing is known of layer by layer."""
    return [each.name for each in report.checkpoints if not known_layers(each)]


def place(name: str) -> tuple[str, str]:
    """Block and kind of a layer's name: model.layers.3.mlp.experts.7.up_proj is of block 3, and an experts.up_proj."""
    found = re.search(r"\.(\d+)\.(.*)", name)
    if found is None:
        return OUTSIDE, name
    kind = re.sub(r"\.\d+(?=\.)", "", found[2])
    return found[1], re.sub(r"^(self_attn|mlp|attention)\.", "", kind)
