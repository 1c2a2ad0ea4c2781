"""What a conversion will do, known from headers alone: every layer's scheme, every output tensor's type and shape, every refusal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.writer import TensorPlan, planned_bytes
from quantkit.conversion.recipe import Recipe, Rule
from quantkit.core.scheme import UNQUANTIZED, Scheme
from quantkit.core.scheme_names import FALLBACK_GROUPS, fit_group, parse_scheme, takes_group, with_group
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.base import Format, plan_shapes
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import get_format
from quantkit.methods.base import Rounding, Transform
from quantkit.methods.registry import get_rounding, get_transform
from quantkit.models.architecture import Architecture, Linear


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear: how it will be stored, by which rounding and after which transform. `note` says where the recipe's own scheme did not fit."""

    linear: Linear
    scheme: Scheme
    rounding: Rounding
    note: str | None = None
    transform: Transform | None = None


@dataclass(eq=False)
class Plan:
    """Everything a conversion will read and write.

    Attributes:
        layers: quantized linears by checkpoint name, in block order.
        left_alone: matrices that keep their type, embeddings aside, with the reason.
        tensors: every output tensor in the order of the file.
        carried: dense names copied as they are (cast to `dtype` when one is given).
        moved: for every block with a transform, by path, the unquantized tensors of its own, which are written with its layers: a transform may
            be folded into them.
        max_shard_size: bytes of one weight file.
    """

    format: Format
    layers: dict[str, LayerPlan]
    left_alone: dict[str, str]
    ignored: list[str]
    tensors: list[TensorPlan]
    carried: list[str]
    bytes_before: int
    max_shard_size: int
    bits_of_layers: int = 0
    weights_of_layers: int = 0
    parameters: int = 0
    notes: list[str] = field(default_factory=list)
    moved: dict[str, list[str]] = field(default_factory=dict)

    @property
    def needs_calibration(self) -> bool:
        return any(layer.rounding.needs_calibration or layer.transform is not None for layer in self.layers.values())

    @cached_property
    def planned(self) -> dict[str, TensorPlan]:
        """The output tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Every quantized layer's scheme by its name in the checkpoint and, where that is another, in transformers' module tree."""
        by_name = {name: layer.scheme for name, layer in self.layers.items()}
        return by_name | {layer.linear.path: layer.scheme for layer in self.layers.values()}

    @cached_property
    def bytes_after(self) -> int:
        """All weight files, headers included."""
        return planned_bytes(self.tensors, self.max_shard_size)

    @property
    def linear_bpw(self) -> float:
        """All bits stored for the quantized linears over the number of their weights."""
        return self.bits_of_layers / max(1, self.weights_of_layers)

    @property
    def file_bpw(self) -> float:
        """All bits of the weight files, headers included, over all parameters."""
        return 8 * self.bytes_after / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what a dry run tells a program."""
        layers = {
            name: {"shape": list(layer.linear.shape), "scheme": layer.scheme.name, "rounding": type(layer.rounding).__name__, "note": layer.note,
                   "transform": type(layer.transform).__name__ if layer.transform is not None else None}
            for name, layer in self.layers.items()
        }
        return {
            "format": self.format.name, "layers": layers, "left_alone": self.left_alone, "needs_calibration": self.needs_calibration,
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "linear_bpw": self.linear_bpw, "file_bpw": self.file_bpw,
        }  # fmt: skip


def make_plan(
    source: OpenedCheckpoint, architecture: Architecture, recipe: Recipe, format_name: str, *, max_shard_size: int, dtype: torch.dtype | None = None,
    allocated: Mapping[str, str] | None = None,
) -> Plan:  # fmt: skip
    """Decide every layer and refuse what cannot be done.

    Args:
        dtype: the type of unquantized tensors in the output; None keeps each as it is.
        allocated: schemes chosen for some layers in place of their rules'.

    Raises:
        RecipeError: a pattern that matches nothing, a strict group that does not divide, or nothing left to quantize.
        FormatError: the container cannot hold a layer's scheme.
    """
    unbuilt = _unbuilt(source, architecture)
    layers, left_alone = _decide(architecture, unbuilt, recipe, source, get_format(format_name), allocated or {})
    fmt = get_format(format_name, (layer.scheme for layer in layers.values()), dtype or source.dtype)
    _check_format(fmt, layers)
    ignored = _ignored_linears(architecture, layers) | {name for name in unbuilt if f"{name}.weight" in source}
    plan = Plan(fmt, layers, left_alone, sorted(ignored), [], [], source.reader.total_bytes, max_shard_size)
    model_dtype = dtype or source.dtype
    conv1d = {linear.name for block in architecture.blocks for linear in block.linears if linear.is_transposed}
    for name in _in_file_order(source):
        module = name.removesuffix(".weight")
        if module in layers and name.endswith(".weight"):
            _plan_layer(plan, layers[module], model_dtype)
        else:
            info = source.reader.info(name) if name in source.reader else None
            kept = info.dtype if info is not None else model_dtype
            shape = tuple(info.shape) if info is not None else source.quantized(module).shape
            if info is None and module in conv1d:
                shape = shape[::-1]
            plan.tensors.append(TensorPlan(name, dtype if dtype is not None and kept.is_floating_point else kept, shape))
            plan.carried.append(name)
            plan.parameters += torch.Size(shape).numel()
    _move(plan, architecture)
    return plan


def _move(plan: Plan, architecture: Architecture) -> None:
    """Take from what is carried the tensors that belong to one block with a transform alone."""
    owners: dict[str, set[str]] = defaultdict(set)
    for path, _ in architecture.model.named_parameters(remove_duplicate=False):
        for name in architecture.stored.sources(path):
            owners[name].add(path)
    for block in architecture.blocks:
        if any(linear.name in plan.layers and plan.layers[linear.name].transform is not None for linear in block.linears):
            own = [f"{block.path}.{name}" for name, _ in block.module.named_parameters()]
            names = {name for path in own if (name := architecture.stored.find(path)) is not None and owners[name] <= set(own)}
            plan.moved[block.path] = [name for name in plan.carried if name in names]
    moved = {name for names in plan.moved.values() for name in names}
    plan.carried = [name for name in plan.carried if name not in moved]


def _unbuilt(source: OpenedCheckpoint, architecture: Architecture) -> dict[str, str]:
    """Matrices of the checkpoint that are in no module of the tree, by name, with the reason to leave them alone."""
    why = "transformers builds no module for it"
    return {name.removesuffix(".weight"): why for name in architecture.unplaced(source.names) if _is_matrix(source, name)}


def _is_matrix(source: OpenedCheckpoint, name: str) -> bool:
    if name not in source.reader:
        return True
    info = source.reader.info(name)
    return info.dtype.is_floating_point and sum(size > 1 for size in info.shape) > 1


def _decide(
    architecture: Architecture, unbuilt: dict[str, str], recipe: Recipe, source: OpenedCheckpoint, fmt: Format, allocated: Mapping[str, str]
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    layers: dict[str, LayerPlan] = {}
    outside = {linear.name: "outside the decoder blocks" for linear in architecture.outside}
    alone = {name: why for block in architecture.blocks for name, why in block.left_alone.items()} | unbuilt
    left_alone = {name: why for name, why in outside.items() if f"{name}.weight" in source} | alone
    linears = [linear for block in architecture.blocks for linear in block.linears]
    _refuse_patterns(recipe, [linear.name for linear in linears], outside | alone)
    chosen = {linear.name: recipe.rule_for(linear.name) for linear in linears}
    _refuse_groups(linears, chosen)
    common_group = None if fmt.holds_mixed else _common_group(linears, chosen)
    for linear in linears:
        rule = chosen[linear.name]
        if rule is None or rule.scheme == "none":
            left_alone[linear.name] = "no rule of the recipe names it" if rule is None else f"ignored by {rule.pattern!r}"
        elif linear.is_transposed and not fmt.holds_conv1d:
            left_alone[linear.name] = f"a Conv1D, which loaders of {fmt.name} do not take, and those of gptq do"
        else:
            chosen_rule = with_scheme(rule, allocated[linear.name]) if linear.name in allocated else rule
            layer = fit(linear, chosen_rule, recipe, common_group=common_group)
            may_stay = layer.scheme.is_quantized and not rule.strict and holds(fmt, parse_scheme(rule.scheme))
            why = fmt.why_not(layer.scheme, linear.shape) if may_stay else None
            if layer.scheme.is_quantized and why is None:
                layers[linear.name] = layer
            else:
                left_alone[linear.name] = ", and ".join(words for words in (layer.note, why) if words)
    if not fmt.holds_mixed:
        _leave_all_but_one_scheme(layers, left_alone, fmt)
    if not layers:
        raise RecipeError(_nothing_left(recipe, left_alone))
    return layers, left_alone


def _refuse_patterns(recipe: Recipe, names: list[str], fixed: dict[str, str]) -> None:
    """A pattern of the user's that matches nothing is a mistake; a shipped recipe may name layers other families have."""
    shipped = {rule.pattern for rule in Recipe.load(recipe.name).rules} if _is_shipped(recipe.name) else set()
    for rule in recipe.rules:
        if not names or rule.pattern in shipped or any(rule.matches(name) for name in names):
            continue
        reason = next((f"{name}, which stays as it is: {why}" for name, why in fixed.items() if rule.matches(name)), None)
        if reason is None:
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise RecipeError(f"pattern {rule.pattern!r} matches no layer; layers end in {', '.join(ends[:12])}, an example is {names[0]}")
        if rule.scheme != "none":
            raise RecipeError(f"pattern {rule.pattern!r} matches only {reason}")


def _refuse_groups(linears: list[Linear], chosen: dict[str, Rule | None]) -> None:
    """A group size that the user gave divides every layer it applies to, or is refused with all of them named."""
    for rule in {id(rule): rule for rule in chosen.values() if rule is not None and rule.strict}.values():
        weight = parse_scheme(rule.scheme).weight
        assert weight is not None and weight.group is not None
        columns = {linear.name: linear.shape[1] for linear in linears if chosen[linear.name] is rule}
        bad = [name for name, count in columns.items() if count % weight.group]
        if bad:
            works = [str(g) for g in (256, 128, 64, 32, 16) if all(count % g == 0 for count in columns.values())][:3]
            raise RecipeError(
                f"group size {weight.group} does not divide the {columns[bad[0]]} input features of {_and_more(bad)}; "
                f"use {' or '.join([*works, '-1 (one scale a channel)'])}, give them a scheme of their own with --override, "
                "or leave the group size out: every layer then takes the largest that fits"
            )


def _nothing_left(recipe: Recipe, left_alone: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, why in left_alone.items():
        reasons.setdefault(why, []).append(name)
    return f"recipe {recipe.name} leaves nothing to quantize: " + "; ".join(f"{_and_more(names)}: {why}" for why, names in reasons.items())


def _and_more(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _is_shipped(name: str) -> bool:
    from quantkit.paths import packaged

    return (packaged("recipes") / f"{name}.yaml").is_file()


def _common_group(linears: list[Linear], chosen: dict[str, Rule | None]) -> int | None:
    """The group for a container whose layers share one: the largest of 64 and 32 that divides every layer its rule does not divide, or None."""
    columns, groups = [], []
    for linear in linears:
        rule = chosen[linear.name]
        scheme = UNQUANTIZED if rule is None else parse_scheme(rule.scheme)
        group = scheme.weight.group if scheme.weight is not None and takes_group(scheme) else None
        if isinstance(group, int) and group > 0:
            columns.append(linear.shape[1])
            groups.append(group)
    if not groups or all(count % max(groups) == 0 for count in columns):
        return None
    return next((group for group in FALLBACK_GROUPS if group < max(groups) and all(count % group == 0 for count in columns)), None)


def _leave_all_but_one_scheme(layers: dict[str, LayerPlan], left_alone: dict[str, str], fmt: Format) -> None:
    """Layers that a recipe's fallback gave another scheme keep their type, where the container holds one scheme; unlike rules are a mistake.

    Raises:
        FormatError: the recipe itself asks for more than one scheme.
    """
    asked = sorted({layer.scheme.name for layer in layers.values() if layer.note is None})
    if len(asked) > 1:
        raise FormatError(f"{fmt.name} holds one scheme a model, and the recipe asks for {', '.join(asked)}; use compressed-tensors")
    main = asked[0] if asked else Counter(layer.scheme.name for layer in layers.values()).most_common(1)[0][0] if layers else None
    for name in [name for name, layer in layers.items() if layer.scheme.name != main]:
        left_alone[name] = f"{layers.pop(name).note}, and {fmt.name} holds one scheme a model"


def holds(fmt: Format, scheme: Scheme) -> bool:
    """Whether a container takes the scheme where its groups and blocks divide the weight."""
    group = scheme.weight.group if scheme.weight is not None else None
    size = max(group) if isinstance(group, tuple) else max(group or 1, 1)
    return scheme.weight is None or fmt.why_not(scheme, (1024 * size, 1024 * size)) is None


def with_scheme(rule: Rule, scheme: str) -> Rule:
    """The rule for a layer that was allocated another scheme, whose group may fall as a recipe's own does."""
    return rule.model_copy(update={"scheme": scheme, "strict": False})


def fit(linear: Linear, rule: Rule, recipe: Recipe, *, common_group: int | None = None) -> LayerPlan:
    """How a rule stores a linear: in its own groups, in smaller ones, or by the fallback.

    Args:
        common_group: for containers whose layers share one group size, where the rule's own does not divide them all.
    """
    wanted = parse_scheme(rule.scheme)
    if common_group is not None and takes_group(wanted) and not rule.strict:
        note = f"groups of {common_group} divide every layer, and the container holds one group size"
        return LayerPlan(linear, with_group(wanted, common_group), get_rounding(rule.rounding_name, rule.rounding_settings), note)
    rounding = get_rounding(rule.rounding_name, rule.rounding_settings)
    transform = next((get_transform(name, settings) for name, settings in rule.transform_settings), None)
    if transform is not None:
        rounding = transform.rounding(rounding)
    rows, columns = linear.shape
    fitted = fit_group(wanted, linear.shape)
    if fitted == wanted:
        return LayerPlan(linear, wanted, rounding, None, transform)
    assert wanted.weight is not None and not rule.strict
    if fitted is not None and isinstance(wanted.weight.group, tuple):
        high, wide = wanted.weight.group
        return LayerPlan(linear, fitted, rounding, f"blocks of {high} x {wide} do not divide {rows} x {columns}, so {fitted.name}", transform)
    if fitted is not None:
        return LayerPlan(linear, fitted, rounding, f"groups of {wanted.weight.group} do not divide {columns} columns, so {fitted.name}", transform)
    fallback = parse_scheme(recipe.fallback)
    note = f"no group of {wanted.name} divides {columns} columns, so the fallback {fallback.name}"
    return LayerPlan(linear, fallback, rounding, note, transform if fallback.is_quantized else None)


def _check_format(fmt: Format, layers: dict[str, LayerPlan]) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        why = fmt.why_not(layer.scheme, layer.linear.shape)
        if why:
            problems[why].append(name)
    for why, names in problems.items():
        raise FormatError(f"{fmt.name} cannot hold {layers[names[0]].scheme.name} of {_and_more(names)}: {why}")


def _ignored_linears(architecture: Architecture, layers: dict[str, LayerPlan]) -> set[str]:
    """Matrices that a loader would otherwise take for quantized: some make a Linear of what is none here, such as a router.

    By the name in the checkpoint and, where that is another, in transformers' module tree: engines go by the one, transformers by the other.
    """
    quantized = {layer.linear.path for layer in layers.values()}
    alone = {name for block in architecture.blocks for name in block.left_alone}
    names = set()
    for path, module in architecture.model.named_modules():
        if path in alone or (isinstance(module, nn.Linear | Conv1D) and path not in quantized):
            parts = [part for parameter, _ in module.named_parameters(path, recurse=False) for part in architecture.stored.sources(parameter)]
            names |= {path, *(part.removesuffix(".weight") for part in parts if part.endswith(".weight"))}
    return names


def _in_file_order(source: OpenedCheckpoint) -> list[str]:
    """Dense names where their first stored part stands."""
    owner = {part: f"{module}.weight" for module in source.schemes for part in source.parts(module)}
    return list(dict.fromkeys(owner.get(name, name) for name in source.reader.names))


def _plan_layer(plan: Plan, layer: LayerPlan, model_dtype: torch.dtype) -> None:
    rows, columns = layer.linear.shape
    for local, (dtype, shape) in plan_shapes(plan.format, layer.scheme, layer.linear.shape, model_dtype).items():
        tensor = TensorPlan(f"{layer.linear.name}.{local}", dtype, shape)
        plan.tensors.append(tensor)
        plan.bits_of_layers += 8 * tensor.nbytes
    plan.weights_of_layers += rows * columns
    plan.parameters += rows * columns
