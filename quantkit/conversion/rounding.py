"""One group of linears to quantized tensors: check, stack what shares an input, round, measure."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.plan import Plan
from quantkit.conversion.report import LayerResult
from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import CalibrationError, SourceError
from quantkit.formats.base import Format
from quantkit.formats.fusion import with_one_range
from quantkit.methods.base import Rounding, Statistics
from quantkit.methods.clip import ClippedToNearest
from quantkit.methods.registry import get_rounding
from quantkit.models.experts import expert_of
from quantkit.models.streaming import Weights

MIN_TOKENS = 32
"""Fewer tokens than this say nothing of a layer's input (experts that calibration hardly reached)."""


def shared_ranges(names: list[str], plan: Plan, weights: Weights) -> dict[str, float]:
    """The largest weight of each of these layers and of those an engine joins it with, where a scale of the tensor depends on it.

    One weight is in memory at a time. Layers that are joined with none like them have no entry: their range is their own.
    """
    ranges = {}
    for joined in with_one_range(name for name in names if _shares_range(plan.layers[name])):
        kinds: dict[tuple[str, Rounding], list[str]] = {}
        for name in joined:
            kinds.setdefault((plan.layers[name].scheme.name, plan.layers[name].rounding), []).append(name)
        for alike in (names for names in kinds.values() if len(names) > 1):
            largest = max(float(finite_weight(plan.layers[name], weights).abs().max()) for name in alike)
            ranges |= dict.fromkeys(alike, largest)
    return ranges


def _shares_range(layer: LayerPlan) -> bool:
    return layer.scheme.weight is not None and layer.scheme.weight.shares_range


def round_together(
    names: list[str], plan: Plan, weights: Weights, statistics: Statistics | None, model_dtype: torch.dtype, device: torch.device,
    largest: float | None = None,
) -> Iterator[tuple[str, QuantizedTensor, LayerResult]]:  # fmt: skip
    """Quantize linears that read one input; those with one scheme and rounding are rounded as one tall matrix, if rows can be taken apart again.

    Experts that all see the same tokens are rounded one by one all the same: a block's experts at once would take several times its memory.

    Args:
        largest: the largest weight of theirs and of layers that are rounded elsewhere and have one range with them; None where there are none.
    """
    if statistics is not None and statistics.num_tokens < MIN_TOKENS:
        statistics = None
    kinds: dict[tuple[str, Rounding, str], list[str]] = {}
    for name in names:
        layer = plan.layers[name]
        alone = name if layer.scheme.weight is not None and layer.scheme.weight.is_flat else expert_of(name) or ""
        kinds.setdefault((layer.scheme.name, layer.rounding, alone), []).append(name)
    for alike in kinds.values():
        yield from _round_alike([plan.layers[name] for name in alike], plan, weights, statistics, model_dtype, device, largest)


def _round_alike(
    layers: list[LayerPlan], plan: Plan, weights: Weights, statistics: Statistics | None, model_dtype: torch.dtype, device: torch.device,
    largest: float | None,
) -> Iterator[tuple[str, QuantizedTensor, LayerResult]]:  # fmt: skip
    first = layers[0]
    spec = first.scheme.weight
    assert spec is not None
    parts = [finite_weight(layer, weights).to(device) for layer in layers]
    rounding, note = affordable(first.rounding, statistics, parts[0].shape[1], is_calibrated=plan.needs_calibration)
    stacked = torch.cat(parts if largest is None else [*parts, _row_of(largest, parts[0])])
    try:
        rounded = rounding(stacked, spec, plan.format.scale_dtype(model_dtype), statistics)
    except CalibrationError as error:
        raise CalibrationError(f"{' and '.join(layer.linear.name for layer in layers[:3])}: {error}") from error
    start = 0
    for layer, weight in zip(layers, parts, strict=True):
        q = rounded.rows(start, start + weight.shape[0])
        start += weight.shape[0]
        _require_scales(layer, weight, q, plan.format)
        result = LayerResult(
            layer.linear.name, layer.scheme.name, type(rounding).__name__, relative_error(weight, q.dequantize(), statistics),
            None if statistics is None else statistics.num_tokens, "; ".join(n for n in (layer.note, note) if n) or None,
        )  # fmt: skip
        yield layer.linear.name, q, result


def _row_of(largest: float, weight: Tensor) -> Tensor:
    """A row [1, K] beside a weight that reaches as far as all its range is shared with; nothing else of it touches other rows."""
    row = torch.zeros_like(weight[:1])
    row[0, 0] = largest
    return row


def affordable(rounding: Rounding, statistics: Statistics | None, num_inputs: int, *, is_calibrated: bool = True) -> tuple[Rounding, str | None]:
    """The rounding, or the one to take in its place with why: a Hessian of less than half its inputs' number misleads GPTQ, its diagonal does not.

    Args:
        is_calibrated: whether layers are calibrated at all, so that one without statistics was not reached.
    """
    if statistics is None and is_calibrated and isinstance(rounding, ClippedToNearest):
        return get_rounding("mse"), "too few calibration tokens reached it, so its scales were searched on the weight alone"
    if not rounding.needs_calibration or (statistics is not None and statistics.num_tokens >= num_inputs // 2):
        return rounding, None
    if statistics is None:
        return get_rounding("mse"), "too few calibration tokens reached it, so its scales were searched on the weight alone"
    return get_rounding("mse"), f"only {statistics.num_tokens} calibration tokens reached its {num_inputs} inputs, so its scales alone were searched"


def _require_scales(layer: LayerPlan, weight: Tensor, q: QuantizedTensor, fmt: Format) -> None:
    """Raises SourceError where a scale had to be cut to what its type holds: the largest weights would become far smaller."""
    dtype = q.scale.dtype
    if q.spec.scale != "float" or not bool((q.scale.abs() >= torch.finfo(dtype).max).any()):
        return
    has_wider = dtype != torch.bfloat16 and fmt.scale_dtype(torch.bfloat16) == torch.bfloat16
    way = f"leave it with --ignore '{layer.linear.name}$'{', or use --dtype bfloat16' if has_wider else ''}"
    largest, name = f"{weight.abs().max():.3g}", f"{layer.linear.name}.weight"
    raise SourceError(f"{name} holds values up to {largest}, whose scales {str(dtype).removeprefix('torch.')} cannot hold; {way}")


def finite_weight(layer: LayerPlan, weights: Weights) -> Tensor:
    """The layer's weight as float32 [N, K].

    Raises:
        SourceError: it holds NaN or infinity.
    """
    name = f"{layer.linear.name}.weight"
    weight = weights.get(name).float()
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise SourceError(f"{name} holds {bad} values that are NaN or infinite; the source model is damaged")
    return weight.T.contiguous() if layer.linear.is_transposed else weight


def relative_error(weight: Tensor, rounded: Tensor, statistics: Statistics | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 by the Hessian, or ||W - Q||^2 / ||W||^2 without one."""
    difference = weight - rounded
    if statistics is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    lost = ((difference @ statistics.hessian) * difference).sum()
    return float(lost / ((weight @ statistics.hessian) * weight).sum().clamp(min=1e-30))
