"""Engines that an output is meant for: one that would not load it is told before any work, with the nearest that it would."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.conversion.layer_plan import holds
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.plan import Plan
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import fit_group, parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Format
from quantkit.formats.engine_rules import Stored, StoredLayer
from quantkit.formats.engines import Engine, Verdict, find_engine, verdict
from quantkit.formats.moves import obstacle
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import CONTAINERS, get_format

_SCHEMES = ("w4a16", "w4a16-asym", "w8a16-channel", "w8a16", "fp8-dynamic", "fp8-block", "w8a8-int8", "nf4", "int8")
"""What is looked for, in this order, where an engine loads the layers as they are planned from no container."""


def stored_by(plan: Plan, model_dtype: torch.dtype) -> Stored:
    """The checkpoint that a plan will make, as the rules of engines look at it."""
    if plan.config is None:
        return Stored(None, model_dtype=model_dtype)
    return _stored(plan.format, {name: layer.scheme for name, layer in plan.layers.items()}, plan, model_dtype, plan.config)


def stored_as(plan: Plan, schemes: dict[str, Scheme], model_dtype: torch.dtype) -> Stored:
    """The same with these layers alone, of these schemes, in the plan's container."""
    fmt = get_format(plan.format.name.removesuffix("-v2"), schemes.values(), model_dtype)
    return _stored(fmt, schemes, plan, model_dtype, fmt.config(schemes, plan.ignored))


def require_loadable(plan: Plan, source: OpenedCheckpoint, options: ConvertOptions, model_dtype: torch.dtype) -> None:
    """Notes where it is not known whether an engine loads the output.

    Args:
        source: what is converted, which may be quantized itself.

    Raises:
        FormatError: an engine of `target_engines` would not.
    """
    for name in options.target_engines:
        engine = find_engine(name)
        found = verdict(engine, stored_by(plan, model_dtype))
        if found.loads is False:
            raise FormatError(_refusal(engine, found, plan, source, options, model_dtype))
        plan.notes += notes_on(found)


def notes_on(found: Verdict) -> list[str]:
    """What a verdict that is no refusal has to say."""
    if found.loads is None:
        return [f"whether {found.engine} {found.version} loads this is not known"]
    return [f"for {found.engine} {found.version}: {found.reason}"] if found.reason else []


def _refusal(
    engine: Engine, found: Verdict, plan: Plan, source: OpenedCheckpoint, options: ConvertOptions, model_dtype: torch.dtype
) -> str:
    schemes = sorted({layer.scheme.name for layer in plan.layers.values()})
    what = f"{plan.format.name} with {len(plan.layers)} layers of {', '.join(schemes)}"
    instead = next(_instead(engine, plan, source, model_dtype), None)
    if instead and "--override" in instead and options.overrides:
        instead += f" in place of {' and '.join(map(repr, options.overrides))}"
    way = f"nearest that it loads: {instead}" if instead else "it loads nothing near; bf16 writes ordinary weights"
    return f"{engine.name} {engine.version} would not load {what}: {found.reason}; {way}"


def _instead(engine: Engine, plan: Plan, source: OpenedCheckpoint, model_dtype: torch.dtype) -> Iterator[str]:
    """The same layers in another container, another scheme in the same one, then another in another; of a source whose codes are to be kept, those
    that take them first."""
    again = " --requantize" if plan.keeps_codes else ""
    as_planned = {name: layer.scheme for name, layer in plan.layers.items()}
    for container in CONTAINERS:
        if container != plan.format.name.removesuffix("-v2") and _loads(engine, container, as_planned, plan, model_dtype):
            fmt, moves = get_format(container, as_planned.values(), model_dtype), plan.keeps_codes
            lossy = moves and any(obstacle(source, name, fmt, layer.linear.shape) for name, layer in plan.layers.items())
            yield f"the same layers with --format {container}{again if lossy else ''}"
    own = plan.format.name.removesuffix("-v2")
    for container in (own, *(each for each in CONTAINERS if each != own)):
        for name in _SCHEMES:
            fitted = {layer: fit_group(parse_scheme(name), planned.linear.shape) for layer, planned in plan.layers.items()}
            schemes = {layer: scheme for layer, scheme in fitted.items() if scheme is not None}
            if len(schemes) == len(plan.layers) and _loads(engine, container, schemes, plan, model_dtype):
                yield f"{name}, as by --format {container} --override '.={name}'{again}"


def _loads(engine: Engine, container: str, schemes: dict[str, Scheme], plan: Plan, model_dtype: torch.dtype) -> bool:
    fmt = get_format(container, schemes.values(), model_dtype)
    fits = all(holds(fmt, scheme) and fmt.why_not(scheme, plan.layers[name].linear.shape) is None for name, scheme in schemes.items())
    if not fits or (not fmt.holds_mixed and len(set(schemes.values())) > 1):
        return False
    stored = _stored(fmt, schemes, plan, model_dtype, fmt.config(schemes, plan.ignored))
    return verdict(engine, stored).loads is True


def _stored(fmt: Format, schemes: dict[str, Scheme], plan: Plan, model_dtype: torch.dtype, config: dict[str, object]) -> Stored:
    kept = next((layer.kept for layer in plan.layers.values() if layer.kept), None)
    return Stored(
        container=str(config["quant_method"]), config=config, model_dtype=model_dtype, plain=tuple(plan.ignored),
        layers=tuple(StoredLayer(name, plan.layers[name].linear.shape, scheme) for name, scheme in schemes.items()),
        scale_dtype=kept[0] if kept else fmt.scale_dtype(model_dtype),
    )  # fmt: skip
