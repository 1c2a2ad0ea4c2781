"""Are the stored numbers possible, and near the original's? One tensor in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from quantkit.conversion.rotating import RotatedWeights
from quantkit.core.difference import difference
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import rounding_noise
from quantkit.errors import QuantkitError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.streaming import Weights

_POWER_LIMIT, _ROW_LIMIT = 1.0, 1.5
"""Relative squared errors that no rounding reaches, except at 2 bits: of a layer, of one row. Leaving a layer out would be 1."""
_LEAST_NOISE, _LEAST_ROW_NOISE = 4, 6
"""Times the noise of rounding to nearest that a layer, and a row, may lie away whatever its power: the noise is up to 0.43 of it at 2 bits."""
_NOISE_LIMIT, _USUAL_LIMIT = 64, 10
"""Times that noise: what no layer reaches, and what half of the layers do not. GPTQ moves weights further than rounding does for its outputs' sake:
0.7 to 4 times in conversions by three tools at 2 to 8 bits, up to 44 in single layers and 3 in the median where it is hardly damped and sees about as
many tokens as inputs. A zero point off by one is 12."""


@dataclass(slots=True)
class LayerFindings:
    """Problems by the name of the check, and every layer's squared error: over the weight's power, and over the noise of rounding to nearest; of
    layers that the original has quantized too, whether they are its own bit for bit."""

    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, float] = field(default_factory=dict)
    over_noise: dict[str, float] = field(default_factory=dict)
    moved: dict[str, bool] = field(default_factory=dict)


def examine_layers(
    opened: OpenedCheckpoint,
    source: OpenedCheckpoint | RotatedWeights | None,
    transposed: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> LayerFindings:
    """Decode every quantized layer once: codes, scales and zero points in range, and its distance from the original's weight.

    Args:
        transposed: layers that the original keeps as [K, N] where it does not quantize them.
    """
    findings = LayerFindings()
    act_order = bool((opened.reader.quantization_config or {}).get("desc_act"))
    for number, module in enumerate(opened.schemes):
        try:
            q = opened.quantized(module)
        except QuantkitError as error:
            findings.problems["decoding"].append(str(error))
            continue
        except (AssertionError, RuntimeError, IndexError) as error:
            findings.problems["decoding"].append(f"{module} cannot be decoded: {error}")
            continue
        for check, problem in _impossible(q, act_order):
            findings.problems[check].append(f"{module} {problem}")
        if source is not None and f"{module}.weight" in source:
            weight = source.get(f"{module}.weight").float()
            turned = module in transposed and module not in source.schemes
            _measure(module, q, weight.T if turned else weight, findings)
            if module in source.schemes and tuple(weight.shape) == q.shape:
                findings.moved[module] = difference(q, weight).is_none
        if progress:
            progress(number + 1, len(opened.schemes))
    usual = median(findings.over_noise.values()) if findings.over_noise else 0.0
    if usual > _USUAL_LIMIT:
        cause = "zero points, scales or their labels are not those the codes were made with"
        words = f"half of the layers are {usual:.3g} or more times as far from the original as rounding puts them: {cause}"
        findings.problems["errors"].insert(0, words)
    return findings


def unlike_tensors(opened: OpenedCheckpoint, source: Weights, leave_out: Collection[str] = ()) -> tuple[list[str], int]:
    """Tensors that are not the original's (after the cast to their type, if it changed), and how many are."""
    problems, num_equal = [], 0
    for name in opened.dense_names:
        if name not in source or name in leave_out:
            continue
        ours, theirs = opened.get(name), source.get(name)
        if ours.shape != theirs.shape:
            problems.append(f"{name} is {list(ours.shape)}, and {list(theirs.shape)} in the original")
        elif not _equal(ours, theirs.to(ours.dtype)):
            change = (ours.float() - theirs.float()).abs()
            values = f"{int((change != 0).sum())} of {change.numel()} values"
            problems.append(f"{name} differs from the original in {values}, by up to {change.max():.3g}")
        else:
            num_equal += 1
    return problems, num_equal


def _impossible(q: QuantizedTensor, act_order: bool) -> list[tuple[str, str]]:
    """(check, what is wrong) for numbers that no writer means."""
    found = []
    if int(q.codes.max()) > q.spec.max_code:
        found.append(("codes", f"has codes up to {int(q.codes.max())}; {q.spec.bits} bits reach {q.spec.max_code}"))
    scale = q.scales
    if not torch.isfinite(scale).all():
        found.append(("scales", f"has {int((~torch.isfinite(scale)).sum())} scales that are not finite"))
    if (scale == 0).any():
        found.append(("scales", f"has {int((scale == 0).sum())} of {scale.numel()} scales that are zero"))
    if q.input_scale is not None and not bool((q.input_scale.isfinite() & (q.input_scale > 0)).all()):
        found.append(("scales", f"has the input scale {q.input_scale.item()}; it is finite and above 0"))
    if q.zero is not None and (int(q.zero.min()) < 0 or int(q.zero.max()) > q.spec.max_code):
        found.append(("zero points", f"has zero points from {int(q.zero.min())} to {int(q.zero.max())}; the codes end at {q.spec.max_code}"))
    if q.group_of_column is not None:
        low, high, last = int(q.group_of_column.min()), int(q.group_of_column.max()), q.scale.shape[1] - 1
        if low < 0 or high > last:
            found.append(("groups", f"has columns of groups {low} to {high}; groups end at {last}"))
        elif not act_order:
            found.append(("groups", "has its columns' groups out of order, and the config says desc_act false: engines would drop that order"))
    return found


def _measure(module: str, q: QuantizedTensor, weight: Tensor, findings: LayerFindings) -> None:
    if tuple(weight.shape) != q.shape:
        findings.problems["errors"].append(f"{module} is {list(q.shape)}, and {list(weight.shape)} in the original")
        return
    if q.group_of_column is not None and int(q.group_of_column.max()) >= q.scale.shape[1]:
        return
    lost, power = (q.dequantize() - weight).square().sum(1), weight.square().sum(1)
    error = (lost.sum() / power.sum().clamp(min=1e-30)).item()
    findings.errors[module] = error
    row_noise = rounding_noise(weight, q.spec)
    noise = row_noise.sum()
    if noise > 0:
        findings.over_noise[module] = (lost.sum() / noise).item()
    rows = ((lost > torch.maximum(_ROW_LIMIT * power, _LEAST_ROW_NOISE * row_noise)) & (power > 0)).nonzero()[:, 0].tolist()
    is_near = lost.sum() < torch.maximum(_POWER_LIMIT * power.sum(), _LEAST_NOISE * noise)
    if not is_near and lost.any():
        findings.problems["errors"].append(f"{module} is {error:.3g} of its weight's power away from the original")
    elif lost.sum() > _NOISE_LIMIT * noise:
        times = f"{findings.over_noise[module]:.3g} times" if noise > 0 else "infinitely"
        findings.problems["errors"].append(f"{module} is {times} as far from the original as rounding to {q.spec.bits} bits puts it")
    elif rows:
        findings.problems["errors"].append(f"{module} has {len(rows)} rows that are not the original's, the first is row {rows[0]}")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else torch.equal(a, b)
