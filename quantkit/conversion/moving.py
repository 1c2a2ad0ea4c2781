"""The plan of a conversion that quantizes nothing: a quantized source into another container as it is, or into ordinary bfloat16 weights.

What the container cannot hold as it is gets refused before any work, or, with `requantize`, is quantized again from the decoded weights. Whether a
layer is the same is then decided by what was written (see `without_data`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.nearest import nearest_scheme
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.plan import Plan, lay_out
from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Format
from quantkit.formats.kv_scales import HOLDS_KV_SCALES, kv_scheme
from quantkit.formats.moves import ambiguity, has_order, kept_types, obstacle, scheme_in
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import CONTAINERS, PLAIN, get_format
from quantkit.formats.stored_layers import stored_shape, wrong_parts
from quantkit.methods.registry import get_rounding
from quantkit.models.architecture import Architecture, Linear
from quantkit.models.names import is_kv_scale

_NOT_QUANTIZED = "not quantized in the source"
_HELD_OUTSIDE = {"gptq": ("lm_head",), "gptq-v2": ("lm_head",)}
"""Layers outside the blocks that a container's configuration can say to be quantized; compressed-tensors names any layer."""
_ELSEWHERE = "take compressed-tensors, or bf16 for ordinary weights"


@dataclass(frozen=True, slots=True)
class _Move:
    """How the layers of a source go into one container: what each is called there, and why some cannot go."""

    fmt: Format
    schemes: dict[str, Scheme]
    obstacles: dict[str, str]
    misplaced: set[str]
    """Of those with an obstacle, layers that the container takes in no scheme."""


def plan_plain(source: OpenedCheckpoint, architecture: Architecture, options: ConvertOptions) -> Plan:
    """Every weight as bfloat16: decoded where it is quantized."""
    _require_whole(source)
    scales = [name for name in source.dense_names if is_kv_scale(name)] if source.format is not None else []
    plan = lay_out(source, architecture, PLAIN, {}, {}, max_shard_size=options.max_shard_size, dtype=options.carried_dtype, left_out=scales)
    note_ambiguity(plan, source)
    _note_scales(plan, scales, source)
    _note_types(plan, source)
    return plan


def plan_moves(source: OpenedCheckpoint, architecture: Architecture, options: ConvertOptions, name: str) -> Plan:
    """Every quantized layer as it is, in the container that is asked for.

    Args:
        name: of the source, for messages.

    Raises:
        FormatError: the container cannot hold some layers as they are, and `requantize` is not given or does not help.
    """
    _require_whole(source)
    linears = _linears(source, architecture)
    move = _into(options.container, source, architecture, linears)
    if move.obstacles and not options.requantize:
        raise FormatError(_refusal(name, move, source, architecture, linears))
    layers = _layers(move, source, linears)
    names = [linear.name for block in architecture.blocks for linear in block.linears] + [linear.name for linear in architecture.outside]
    left_alone = {linear: _NOT_QUANTIZED for linear in names if linear not in layers and f"{linear}.weight" in source}
    holds_kv = move.fmt.name in HOLDS_KV_SCALES
    scales = [] if holds_kv else [name for name in source.dense_names if is_kv_scale(name)]
    settings = {"max_shard_size": options.max_shard_size, "dtype": options.carried_dtype}
    plan = lay_out(source, architecture, move.fmt, layers, left_alone, left_out=scales, **settings)
    plan.keeps_codes = True
    if holds_kv and (scheme := kv_scheme(source.reader.quantization_config)) is not None:
        plan.settings["kv_cache_scheme"] = dict(scheme)
    if any(layer.kept and has_order(source, name) for name, layer in layers.items()):
        plan.settings["desc_act"] = True
    note_ambiguity(plan, source)
    _note_scales(plan, scales, source)
    _note_types(plan, source)
    return plan


def _require_whole(source: OpenedCheckpoint) -> None:
    problems = wrong_parts(source)
    if problems:
        raise FormatError(f"config and tensors of the source contradict each other: {problems[0]}")


def _note_scales(plan: Plan, scales: list[str], source: OpenedCheckpoint) -> None:
    if scales or (plan.format.name not in HOLDS_KV_SCALES and kv_scheme(source.reader.quantization_config) is not None):
        plan.notes.append(f"the scheme of the KV cache and its {len(scales)} scales are left out: {plan.format.name} has no place for them")


def note_ambiguity(plan: Plan, source: OpenedCheckpoint) -> None:
    if (unclear := ambiguity(source)) is not None:
        plan.notes.append(unclear)


def _note_types(plan: Plan, source: OpenedCheckpoint) -> None:
    """Layers are compared bit for bit; what was never quantized, and takes a type that holds less, is only told of."""
    dense = [name for name in source.dense_names if name in plan.planned]
    narrowed = [name for name in dense if _narrows(source.reader.info(name).dtype, plan.planned[name].dtype)]
    if narrowed:
        kinds = {source.reader.info(name).dtype: plan.planned[name].dtype for name in narrowed}
        told = " and ".join(f"from {before} to {after}".replace("torch.", "") for before, after in kinds.items())
        plan.notes.append(f"{len(narrowed)} tensors that were not quantized are rounded, {told}")


def _narrows(before: torch.dtype, after: torch.dtype) -> bool:
    return before.is_floating_point and torch.promote_types(before, after) != after


def _linears(source: OpenedCheckpoint, architecture: Architecture) -> dict[str, Linear]:
    """The source's quantized layers by name, in the order of the blocks; those outside them, or in no module of the tree, last."""
    every = [linear for block in architecture.blocks for linear in block.linears] + architecture.outside
    known = {linear.name: linear for linear in every if linear.name in source.schemes}
    return known | {name: Linear(name, name, stored_shape(source, name)) for name in source.schemes if name not in known}


def _into(container: str, source: OpenedCheckpoint, architecture: Architecture, linears: dict[str, Linear]) -> _Move:
    fmt = get_format(container, source.schemes.values(), source.dtype)
    inside = {linear.name for block in architecture.blocks for linear in block.linears}
    schemes, obstacles, misplaced = {}, {}, set()
    for name, linear in linears.items():
        why = _misplaced(fmt, linear, inside)
        misplaced |= {name} if why is not None else set()
        why = why or obstacle(source, name, fmt, linear.shape)
        if why is not None:
            obstacles[name] = why.partition("; use ")[0]  # what holds it is looked for below, and told
        elif (scheme := scheme_in(fmt, source.schemes[name], linear.shape)) is not None:
            schemes[name] = scheme
    if not fmt.holds_mixed and len(set(schemes.values())) > 1:
        main = Counter(schemes.values()).most_common(1)[0][0]
        others = {name: scheme for name, scheme in schemes.items() if scheme != main}
        obstacles |= {name: f"{fmt.name} holds one scheme a model, and most layers are {main.name}" for name in others}
        schemes = {name: scheme for name, scheme in schemes.items() if scheme == main}
    return _Move(fmt, schemes, obstacles, misplaced)


def _misplaced(fmt: Format, linear: Linear, inside: set[str]) -> str | None:
    if linear.is_transposed and not fmt.holds_conv1d:
        return f"a Conv1D, which loaders of {fmt.name} do not take"
    if linear.name not in inside and linear.name not in _HELD_OUTSIDE.get(fmt.name, ()) and fmt.name != "compressed-tensors":
        return f"outside the decoder blocks, where loaders of {fmt.name} take no quantized layer{' but lm_head' if fmt.name in _HELD_OUTSIDE else ''}"
    return None


def _layers(move: _Move, source: OpenedCheckpoint, linears: dict[str, Linear]) -> dict[str, LayerPlan]:
    """How each layer is written: as it is, or quantized again."""
    again = get_rounding("mse")
    main = next(iter(move.schemes.values()), None) if not move.fmt.holds_mixed else None
    layers = {}
    for name, linear in linears.items():
        if name in move.schemes:
            layers[name] = LayerPlan(linear, move.schemes[name], again, kept=kept_types(source, name, move.fmt))
            continue
        scheme = main or nearest_scheme(move.fmt, source.schemes[name], linear.shape)
        why = move.fmt.why_not(scheme, linear.shape) if scheme is not None else f"{move.fmt.name} has no scheme for it"
        if scheme is None or why is not None or name in move.misplaced:
            raise FormatError(f"{move.fmt.name} cannot hold {name}, not even quantized again: {why or move.obstacles[name]}; {_ELSEWHERE}")
        if main is None and not move.fmt.holds_mixed:
            main = scheme
        layers[name] = LayerPlan(linear, scheme, again, note=f"quantized again: {move.obstacles[name]}")
    return layers


def _refusal(name: str, move: _Move, source: OpenedCheckpoint, architecture: Architecture, linears: dict[str, Linear]) -> str:
    reasons: dict[str, list[str]] = {}
    for layer, why in move.obstacles.items():
        reasons.setdefault(why, []).append(layer)
    told = "; ".join(f"{layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}: {why}" for why, layers in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    holding = [each for each in CONTAINERS if not _into(each, source, architecture, linears).obstacles]
    elsewhere = f"Every layer goes as it is into {' or '.join(holding)}" if holding else "No container holds every layer as it is"
    try:
        again = {layer.scheme.name for layer in _layers(move, source, linears).values() if layer.kept is None}
        requantize = f"--requantize quantizes them again, to {' and '.join(sorted(again))}"
    except FormatError:
        requantize = "bf16 takes them as ordinary weights"
    of = f"{len(move.obstacles)} of {len(linears)} layers of {name}"
    return f"{move.fmt.name} cannot hold {of} without loss: {told}{more}. {elsewhere}; {requantize}"
