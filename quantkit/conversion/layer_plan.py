"""How every linear will be stored: by the first rule of the recipe that names it, in groups that fit it and that the container holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.conversion.recipe import Recipe, Rule
from quantkit.core.scheme import UNQUANTIZED, Scheme
from quantkit.core.scheme_names import FALLBACK_GROUPS, fit_group, parse_scheme, takes_group, with_group
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.base import Format, KeptTypes
from quantkit.formats.fusion import experts_with_one_group, fused_groups
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.methods.base import Rounding, Transform
from quantkit.methods.registry import get_rounding, get_transform
from quantkit.models.architecture import Architecture, Linear


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear: how it will be stored, by which rounding and after which transform.

    Attributes:
        note: where the recipe's own scheme did not fit, or why a quantized layer does not go over as it is.
        kept: the types of the scales that a layer of a quantized source goes over with, as it is; None for one that is rounded.
    """

    linear: Linear
    scheme: Scheme
    rounding: Rounding
    note: str | None = None
    transform: Transform | None = None
    kept: KeptTypes | None = None


def decide_layers(
    architecture: Architecture, unbuilt: dict[str, str], recipe: Recipe, source: OpenedCheckpoint, fmt: Format, allocated: Mapping[str, str]
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The layers to quantize by checkpoint name, and what keeps its type with the reason.

    Args:
        unbuilt: matrices that are in no module of the tree, with the reason to leave them alone.
        allocated: schemes chosen for some layers in place of their rules'.

    Raises:
        RecipeError: a pattern that matches nothing, a strict group that does not divide, or nothing to quantize.
        FormatError: the container holds one scheme, and the recipe asks for more.
    """
    layers: dict[str, LayerPlan] = {}
    outside = {linear.name: "outside the decoder blocks" for linear in architecture.outside}
    alone = {name: why for block in architecture.blocks for name, why in block.left_alone.items()} | unbuilt
    left_alone = {name: why for name, why in outside.items() if f"{name}.weight" in source} | alone
    linears = [linear for block in architecture.blocks for linear in block.linears]
    _refuse_patterns(recipe, [linear.name for linear in linears], outside | alone)
    chosen = {linear.name: recipe.rule_for(linear.name) for linear in linears}
    _refuse_groups(linears, chosen)
    common_group = None if fmt.holds_mixed else _common_group(linears, chosen)
    misfits: dict[str, str] = {}
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
                misfits[linear.name] = ", and ".join(words for words in (layer.note, why) if words)
    _fall_together(layers, misfits, {name: allocated.get(name) or rule.scheme for name, rule in chosen.items() if rule is not None})
    left_alone |= misfits
    if not fmt.holds_mixed:
        _leave_all_but_one_scheme(layers, left_alone, fmt)
    asks_for_weights = any(rule is not None and rule.scheme != "none" for rule in chosen.values())
    if not layers and (asks_for_weights or (recipe.kv_cache_scheme is None and recipe.rotation is None)):
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


def _fall_together(layers: dict[str, LayerPlan], misfits: dict[str, str], asked: Mapping[str, str]) -> None:
    """Layers that engines join keep to one scheme where one of them cannot have what is asked for all: they take what it takes, or stay as they are.

    Args:
        misfits: layers that the container has no scheme for, with the reason.
        asked: the scheme that each layer was to have; where joined layers were to have unlike ones, that is left to the user.
    """
    for members in fused_groups([*layers, *misfits]).values():
        if len({asked[name] for name in members}) > 1:
            continue
        left = next((name for name in members if name in misfits), None)
        fallen = next((layers[name] for name in members if name in layers and layers[name].note is not None), None)
        for name in (name for name in members if name in layers):
            if left is not None:
                del layers[name]
                misfits[name] = f"engines join it with {left}, where {misfits[left]}"
            elif fallen is not None and layers[name].note is None:
                note = f"engines join it with {fallen.linear.name}, where {fallen.note}"
                layers[name] = replace(layers[name], scheme=fallen.scheme, note=note)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    for name, (scheme, least) in experts_with_one_group(schemes, {name: layers[name].linear.shape[1] for name in schemes}).items():
        if layers[least].note is not None and asked[name] == asked[least]:
            note = f"engines join the experts of a layer, where {least} has {layers[least].note}"
            layers[name] = replace(layers[name], scheme=scheme, note=note)


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
    scheme, note = _fitted(linear.shape, rule, recipe, common_group)
    rounding = get_rounding(rule.rounding_name, rule.rounding_settings)
    transform = next((get_transform(name, settings) for name, settings in rule.transform_settings), None) if scheme.is_quantized else None
    return LayerPlan(linear, scheme, rounding if transform is None else transform.rounding(rounding), note, transform)


def _fitted(shape: tuple[int, int], rule: Rule, recipe: Recipe, common_group: int | None) -> tuple[Scheme, str | None]:
    """The scheme of a weight [N, K], and why it is not the rule's own."""
    wanted, (rows, columns) = parse_scheme(rule.scheme), shape
    if common_group is not None and takes_group(wanted) and not rule.strict:
        return with_group(wanted, common_group), f"groups of {common_group} divide every layer, and the container holds one group size"
    fitted = fit_group(wanted, shape)
    if fitted == wanted:
        return wanted, None
    assert wanted.weight is not None and not rule.strict
    if fitted is None:
        fallback = parse_scheme(recipe.fallback)
        return fallback, f"no group of {wanted.name} divides {columns} columns, so the fallback {fallback.name}"
    if isinstance(wanted.weight.group, tuple):
        high, wide = wanted.weight.group
        return fitted, f"blocks of {high} x {wide} do not divide {rows} x {columns}, so {fitted.name}"
    return fitted, f"groups of {wanted.weight.group} do not divide {columns} columns, so {fitted.name}"


def check_format(fmt: Format, layers: dict[str, LayerPlan]) -> None:
    """Raises FormatError where the container does not hold a layer's scheme."""
    problems: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        why = fmt.why_not(layer.scheme, layer.linear.shape)
        if why:
            problems[why].append(name)
    for why, names in problems.items():
        raise FormatError(f"{fmt.name} cannot hold {layers[names[0]].scheme.name} of {_and_more(names)}: {why}")
