"""What there is to choose in a plan: units of layers that engines read with one scheme, and the schemes each may take in a container."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from quantkit.conversion.budget import family
from quantkit.conversion.layer_plan import LayerPlan, fit, with_scheme
from quantkit.conversion.plan import Plan
from quantkit.conversion.recipe import Recipe, Rule
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.base import Format, is_of_weights, plan_shapes
from quantkit.formats.fusion import fused_groups
from quantkit.formats.registry import get_format

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


@dataclass(frozen=True, slots=True)
class Option:
    """One scheme for a unit: what each layer makes of it by the group rule, and the bits stored."""

    layers: dict[str, LayerPlan]
    bits: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that take one scheme: those an engine joins, all experts of a block, or one layer alone. Options by the scheme's name."""

    name: str
    options: dict[str, Option]

    @property
    def layers(self) -> list[str]:
        return list(next(iter(self.options.values())).layers)


def find_units(plan: Plan, recipe: Recipe, format_name: str, model_dtype: torch.dtype) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """The units of a plan that have a choice, and why some candidates are none in this container.

    Raises:
        FormatError: the container holds one scheme only.
        RecipeError: a layer is left without a candidate, or no layer has two.
    """
    assert recipe.allocate is not None
    named = [*(recipe.allocate.candidates or ()), *(name for rule in recipe.rules for name in (rule.scheme, *(rule.candidates or ())))]
    fmt = get_format(format_name, map(parse_scheme, named))
    if not fmt.holds_mixed:
        raise FormatError(f"{fmt.name} holds one scheme for all layers, so there is nothing to allocate; use compressed-tensors or gptq")
    dropped: dict[str, None] = {}
    found: dict[str, dict[str, Option]] = {}
    for name, layer in plan.layers.items():
        rule = recipe.rule_for(name)
        assert rule is not None
        wanted = _wanted(rule, recipe, fmt)
        if wanted:
            found[name] = _options(layer, rule, recipe, wanted, fmt, model_dtype, dropped)
    units = tuple(_unit(joint, [found[name] for name in members]) for joint, members in _joined(found).items())
    if all(len(unit.options) < 2 for unit in units):
        raise RecipeError("there is nothing to allocate: " + ("; ".join(dropped) or "every layer has one candidate, or its scheme is fixed"))
    return units, tuple(dropped)


def _wanted(rule: Rule, recipe: Recipe, fmt: Format) -> tuple[str, ...]:
    assert recipe.allocate is not None
    if rule.candidates is not None:
        return rule.candidates
    has_steps = fmt.why_not(parse_scheme("w5a16-channel"), (1, 1)) is None
    return recipe.allocate.candidates or family(parse_scheme(rule.scheme), with_fine=not has_steps and not rule.strict)


def _options(
    layer: LayerPlan, rule: Rule, recipe: Recipe, wanted: Iterable[str], fmt: Format, model_dtype: torch.dtype, dropped: dict[str, None]
) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for name in wanted:
        fitted = fit(layer.linear, with_scheme(rule, name), recipe)
        why = fmt.why_not(fitted.scheme, layer.linear.shape) if fitted.scheme.is_quantized else "its fallback leaves layers as they are"
        if why is None:
            options[name] = Option({layer.linear.name: fitted}, stored_bits(fmt, fitted, model_dtype))
        else:
            dropped[f"{name} is no candidate: {why}"] = None
    if not options:
        raise RecipeError(f"no candidate is left for {layer.linear.name}: {'; '.join(dropped)}")
    return options


def stored_bits(fmt: Format, layer: LayerPlan, model_dtype: torch.dtype) -> int:
    """What the container stores of a layer's weights."""
    parts = plan_shapes(fmt, layer.scheme, layer.linear.shape, model_dtype).items()
    return sum(8 * dtype.itemsize * prod(shape) for name, (dtype, shape) in parts if is_of_weights(name))


def _joined(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by the unit they are of, in the order of the plan."""
    names = list(names)
    joint = {member: name for name, members in fused_groups(names).items() for member in members}
    units: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.match(name)
        units.setdefault(expert[1] if expert else joint.get(name, name), []).append(name)
    return units


def _unit(name: str, members: list[dict[str, Option]]) -> Unit:
    """A unit of layers with these options each; what one of them cannot take, none does, and schemes that come to the same are one."""
    shared = [scheme for scheme in members[0] if all(scheme in options for options in members)]
    if not shared:
        raise RecipeError(f"the layers of {name} take one scheme in engines, and the recipe gives them candidates without a common one")
    options: dict[str, Option] = {}
    seen: set[tuple[str, ...]] = set()
    for scheme in shared:
        layers = {layer: plan for options_of in members for layer, plan in options_of[scheme].layers.items()}
        kinds = tuple(plan.scheme.name for plan in layers.values())
        if kinds not in seen:
            seen.add(kinds)
            options[scheme] = Option(layers, sum(options_of[scheme].bits for options_of in members))
    return Unit(name, options)
