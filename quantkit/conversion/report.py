"""The account of one conversion: what was written, how far it is from the original, what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

AS_IT_WAS, DECODED = "as it was", "decoded"
"""What stands in place of a rounding where a quantized layer changes its container, or becomes an ordinary weight."""


@dataclass(slots=True)
class LayerResult:
    """One quantized layer.

    Attributes:
        error: relative squared error; of the layer's output on calibration data where there was any, else of the weight.
        seen_tokens: calibration tokens behind the rounding, None where it looked at the weight alone.
        lossless: of a layer that was quantized already: whether it dequantizes to the same values as before, bit for bit; else None.
        max_error: the largest of these values' changes.
        transform: what became of its transform: where its scale was folded, or why nowhere; None where the recipe asks for none.
        routed_tokens: calibration tokens that the router sent to the expert it is of, None for a layer that is of none.
    """

    name: str
    scheme: str
    rounding: str
    error: float
    seen_tokens: int | None = None
    note: str | None = None
    transform: str | None = None
    lossless: bool | None = None
    max_error: float | None = None
    routed_tokens: int | None = None


@dataclass(slots=True)
class ConversionReport:
    source: str
    output: str
    recipe: str | None
    format: str
    layers: list[LayerResult]
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int
    linear_bpw: float
    file_bpw: float
    seconds: float
    peak_memory_bytes: int
    calibration: str | None = None
    divergence: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    """Files of the source that the output lacks, or has of its own under the same name."""
    kv_cache: str | None = None
    """The cache whose scales were calibrated, in words."""
    calibration_data: dict[str, Any] | None = None
    """The figures behind `calibration`: source, documents, rows and tokens, the seed, and what was held out to measure on."""
    experts: dict[str, Any] | None = None
    """How many calibration tokens reached the experts of each block, and which got too few; None where there are none."""
    allocation: dict[str, Any] | None = None
    """Where schemes were chosen by measurement: budget, choice by unit, predicted and measured KL, and what other sizes would do."""

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / max(1, len(self.layers))

    @property
    def worst(self) -> LayerResult | None:
        """None where no layer was quantized."""
        return max(self.layers, key=lambda layer: layer.error, default=None)

    @property
    def quantized(self) -> list[LayerResult]:
        """The layers that are quantized in the output."""
        return [layer for layer in self.layers if layer.rounding != DECODED]

    @property
    def losslessness(self) -> str | None:
        """How many layers of a quantized source are what they were, in words; None where the source was not quantized, or all of it is again."""
        judged = [layer for layer in self.layers if layer.lossless is not None]
        if not judged:
            return None
        lossy = [layer for layer in judged if not layer.lossless]
        words = f"{len(judged) - len(lossy)} of {len(judged)} layers lossless"
        if not lossy:
            return words
        worst = max(lossy, key=lambda layer: layer.error)
        largest = max(layer.max_error or 0.0 for layer in lossy)
        verb = "rounded to bfloat16" if worst.rounding == DECODED else "quantized again"
        return f"{words}, {len(lossy)} {verb}: off by up to {largest:.3g}, ||W - Q||² / ||W||² up to {worst.error:.2g} ({worst.name})"

    def to_dict(self) -> dict[str, Any]:
        worst = self.worst
        return asdict(self) | {"mean_error": self.mean_error, "worst_layer": worst.name if worst else None, "losslessness": self.losslessness}


def bits_in_words(linear_bpw: float, file_bpw: float) -> str:
    """Bits a weight; a model without quantized layers has one figure."""
    return f"{linear_bpw:.3f} in quantized layers, {file_bpw:.3f} over the file" if linear_bpw else f"{file_bpw:.3f} over the file"


def figure(value: float | None, digits: int = 4) -> str:
    """A number of a report's divergence; None is what JSON has for one that is infinite or undefined."""
    return "not finite" if value is None else f"{value:.{digits}f}"
