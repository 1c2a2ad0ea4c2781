"""The account of one conversion: what was written, how far it is from the original, what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class LayerResult:
    """One quantized layer.

    Attributes:
        error: relative squared error; of the layer's output on calibration data where there was any, else of the weight.
        seen_tokens: calibration tokens behind the rounding, None where it looked at the weight alone.
    """

    name: str
    scheme: str
    rounding: str
    error: float
    seen_tokens: int | None = None
    note: str | None = None


@dataclass(slots=True)
class ConversionReport:
    source: str
    output: str
    recipe: str
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

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / max(1, len(self.layers))

    @property
    def worst(self) -> LayerResult:
        return max(self.layers, key=lambda layer: layer.error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean_error": self.mean_error, "worst_layer": self.worst.name}


def figure(value: float | None, digits: int = 4) -> str:
    """A number of a report's divergence; None is what JSON has for one that is infinite or undefined."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def model_card(report: ConversionReport, base_model: str) -> str:
    """README.md of the output: where it comes from, how it was made, what it cost, how to load it."""
    rows = [
        ("recipe", report.recipe),
        ("container", report.format),
        ("size", f"{report.bytes_before / 1e6:,.1f} MB -> {report.bytes_after / 1e6:,.1f} MB"),
        ("bits per weight", f"{report.linear_bpw:.3f} in quantized layers, {report.file_bpw:.3f} over the file"),
        ("mean / worst layer error", f"{report.mean_error:.2e} / {report.worst.error:.2e} ({report.worst.name})"),
    ]
    if report.calibration:
        rows.append(("calibration", report.calibration.removeprefix("calibration: ")))
    if report.divergence:
        d = report.divergence
        rows.append(("perplexity on held-out calibration rows", f"{figure(d['ppl_baseline'])} -> {figure(d['ppl_quantized'])}"))
        rows.append(("KL divergence from the original", f"{figure(d['kl_mean'], 5)} ± {figure(d['kl_se'], 5)} nats over {d['num_tokens']} tokens"))
        rows.append(("same most likely token", f"{100 * d['top1']:.2f}%"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    account = "Every layer's figures are in quantkit_report.json, the recipe in recipe.yaml."
    front = f"---\nbase_model: {base_model}\nlibrary_name: transformers\ntags: [quantkit, {report.format}]\n---\n" if "/" in base_model else ""
    return f"{front}# {base_model} by quantkit\n\n| | |\n|---|---|\n{table}\n\n{account}\n"
