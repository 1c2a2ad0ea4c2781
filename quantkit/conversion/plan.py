"""What a conversion will do, known from headers alone: every layer's scheme, every output tensor's type and shape, every refusal."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from quantkit.checkpoint.writer import TensorPlan
from quantkit.conversion.recipe import Recipe, Rule
from quantkit.core.scheme import Scheme, fit_group, parse_scheme
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.base import Format, plan_shapes
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import get_format
from quantkit.methods.base import Rounding
from quantkit.methods.registry import get_rounding
from quantkit.models.architecture import Architecture, Linear


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear: how it will be stored and by which rounding. `note` says where the recipe's own scheme did not fit."""

    linear: Linear
    scheme: Scheme
    rounding: Rounding
    note: str | None = None


@dataclass(eq=False, slots=True)
class Plan:
    """Everything a conversion will read and write.

    Attributes:
        layers: quantized linears by checkpoint name, in block order.
        left_alone: matrices of the blocks and the head that keep their type, with the reason.
        tensors: every output tensor in the order of the file.
        carried: dense names copied as they are (cast to `dtype` when one is given).
    """

    format: Format
    layers: dict[str, LayerPlan]
    left_alone: dict[str, str]
    ignored: list[str]
    tensors: list[TensorPlan]
    carried: list[str]
    bytes_before: int
    bits_of_layers: int = 0
    weights_of_layers: int = 0
    parameters: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def needs_calibration(self) -> bool:
        return any(layer.rounding.needs_calibration for layer in self.layers.values())

    @property
    def bytes_after(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def linear_bpw(self) -> float:
        """All bits stored for the quantized linears over the number of their weights."""
        return self.bits_of_layers / max(1, self.weights_of_layers)

    @property
    def file_bpw(self) -> float:
        """All bits of the weight files over all parameters."""
        return 8 * self.bytes_after / max(1, self.parameters)


def make_plan(source: OpenedCheckpoint, architecture: Architecture, recipe: Recipe, format_name: str, dtype: torch.dtype | None = None) -> Plan:
    """Decide every layer and refuse what cannot be done.

    Args:
        dtype: the type of unquantized tensors in the output; None keeps each as it is.

    Raises:
        RecipeError: a pattern that matches nothing, a strict group that does not divide, or nothing left to quantize.
        FormatError: the container cannot hold a layer's scheme.
    """
    layers, left_alone = _decide(architecture, recipe, source, get_format(format_name))
    fmt = get_format(format_name, (layer.scheme for layer in layers.values()))
    _check_format(fmt, layers)
    plan = Plan(fmt, layers, left_alone, _ignored_linears(architecture, layers), [], [], source.reader.total_bytes)
    model_dtype = dtype or source.dtype
    for name in _in_file_order(source):
        module = name.removesuffix(".weight")
        if module in layers and name.endswith(".weight"):
            _plan_layer(plan, layers[module], model_dtype)
        else:
            info = source.reader.info(name) if name in source.reader else None
            kept = info.dtype if info is not None else model_dtype
            shape = tuple(info.shape) if info is not None else source.quantized(module).shape
            plan.tensors.append(TensorPlan(name, dtype if dtype is not None and kept.is_floating_point else kept, shape))
            plan.carried.append(name)
            plan.parameters += torch.Size(shape).numel()
    return plan


def _decide(architecture: Architecture, recipe: Recipe, source: OpenedCheckpoint, fmt: Format) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    layers: dict[str, LayerPlan] = {}
    left_alone = {linear.name: "outside the decoder blocks" for linear in architecture.outside if f"{linear.name}.weight" in source}
    used: set[int] = set()
    for block in architecture.blocks:
        left_alone |= block.left_alone
        for linear in block.linears:
            rule = recipe.rule_for(linear.name)
            used |= {i for i, r in enumerate(recipe.rules) if r.matches(linear.name)}
            if rule is None or rule.scheme == "none":
                left_alone[linear.name] = "no rule of the recipe names it" if rule is None else f"ignored by {rule.pattern!r}"
            elif linear.is_transposed and not fmt.holds_conv1d:
                left_alone[linear.name] = f"a Conv1D, which loaders of {fmt.name} do not take"
            else:
                layers[linear.name] = _fit(linear, rule, recipe)
    unused = [rule.pattern for i, rule in enumerate(recipe.rules) if i not in used]
    if unused and not any(rule.pattern == ".*" for rule in recipe.rules if rule.pattern in unused):
        _refuse_unused(recipe, unused, layers, left_alone)
    if not layers:
        raise RecipeError(f"recipe {recipe.name} leaves nothing to quantize: " + "; ".join(f"{n}: {why}" for n, why in list(left_alone.items())[:3]))
    return layers, left_alone


def _refuse_unused(recipe: Recipe, unused: list[str], layers: dict[str, LayerPlan], left_alone: dict[str, str]) -> None:
    """A pattern of the user's that matches nothing is a mistake; a shipped recipe may name layers other families have."""
    shipped = {rule.pattern for rule in Recipe.load(recipe.name).rules} if _is_shipped(recipe.name) else set()
    strangers = [pattern for pattern in unused if pattern not in shipped]
    if strangers:
        names = sorted({name.rpartition(".")[2] for name in (*layers, *left_alone)})
        raise RecipeError(f"pattern {strangers[0]!r} matches no layer; layers end in {', '.join(names[:12])}")


def _is_shipped(name: str) -> bool:
    from quantkit.paths import packaged

    return (packaged("recipes") / f"{name}.yaml").is_file()


def _fit(linear: Linear, rule: Rule, recipe: Recipe) -> LayerPlan:
    wanted = parse_scheme(rule.scheme)
    rounding = get_rounding(rule.rounding_name, rule.rounding_settings)
    columns = linear.shape[1]
    fitted = fit_group(wanted, columns)
    if fitted == wanted:
        return LayerPlan(linear, wanted, rounding)
    if rule.strict:
        assert wanted.weight is not None
        works = [g for g in (256, 128, 64, 32, 16) if columns % g == 0]
        hint = f"use {' or '.join(map(str, works[:3]))}, or -1 for one scale a channel" if works else "use -1 for one scale a channel"
        raise RecipeError(f"group size {wanted.weight.group} does not divide the {columns} input features of {linear.name}; {hint}, or leave it out")
    if fitted is not None:
        return LayerPlan(linear, fitted, rounding, f"{wanted.name} does not divide {columns} columns, so {fitted.name}")
    fallback = parse_scheme(recipe.fallback)
    return LayerPlan(linear, fallback, rounding, f"no group of {wanted.name} divides {columns} columns, so the fallback {fallback.name}")


def _check_format(fmt: Format, layers: dict[str, LayerPlan]) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        why = fmt.why_not(layer.scheme, layer.linear.shape)
        if why:
            problems[why].append(name)
    for why, names in problems.items():
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise FormatError(f"{fmt.name} cannot hold {layers[names[0]].scheme.name} of {names[0]}{others}: {why}")


def _ignored_linears(architecture: Architecture, layers: dict[str, LayerPlan]) -> list[str]:
    """Linears that a loader would otherwise take for quantized, by checkpoint name."""
    every = [*architecture.outside, *(linear for block in architecture.blocks for linear in block.linears)]
    routers = [name for block in architecture.blocks for name, why in block.left_alone.items() if why == "router of experts"]
    return sorted({linear.name for linear in every if linear.name not in layers} | set(routers))


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
