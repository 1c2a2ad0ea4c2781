"""Recipes: which layer gets which scheme by which rounding, as YAML that is checked whole before any work.

The first rule whose pattern is found in a layer's name decides. A layer no rule names keeps its own type.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit.conversion.budget import Allocate, Budget, checked_candidates
from quantkit.conversion.rotation import ROTATIONS, Rotation, rotation_named
from quantkit.core.scheme import CHANNEL, Scheme
from quantkit.core.scheme_names import parse_scheme, takes_group, with_group
from quantkit.errors import RecipeError, UsageError, did_you_mean
from quantkit.formats.kv_scales import kv_cache_name
from quantkit.formats.registry import get_format
from quantkit.paths import packaged


class Rule(BaseModel):
    """One line of a recipe. `rounding` is a name, or a mapping of `name` and that rounding's settings; so is what stands in `transforms`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    scheme: str
    rounding: str | dict[str, Any] = "mse"
    transforms: tuple[str | dict[str, Any], ...] = ()
    candidates: tuple[str, ...] | None = None
    """Schemes to choose from where the recipe allocates; None for the recipe's own, none at all for a layer whose scheme is fixed."""
    strict: bool = Field(default=False, exclude=True)
    """The user gave this group size: it divides or it is refused."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return checked_pattern(value)

    @field_validator("scheme")
    @classmethod
    def _exists(cls, value: str) -> str:
        parse_scheme(value)
        return value

    @field_validator("candidates")
    @classmethod
    def _can_be_chosen(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return checked_candidates(value)

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name) is not None

    @property
    def rounding_name(self) -> str:
        return _name(self.rounding)

    @property
    def rounding_settings(self) -> dict[str, Any]:
        return _settings(self.rounding)

    @property
    def transform_settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and settings of each transform."""
        return [(_name(transform), _settings(transform)) for transform in self.transforms]


class Recipe(BaseModel):
    """A whole recipe.

    Attributes:
        fallback: the scheme of layers that no group size fits, rounded as their rule says; "none" leaves them as they are.
        moe_calibrate_all_experts: let every expert see every calibration token, whoever it is routed to; nothing where there are no experts.
        allocate: choose schemes by measurement; those of the rules then only say which family, and how layers are rounded.
        rotation: fold a rotation of the hidden states into all weights first: "hadamard", or a mapping of that name, `seed` and `heads`; or "none".
        format: the container where none is asked for; without it compressed-tensors.
        kv_cache_scheme: the KV cache to calibrate scales for: "fp8", "fp8-head", the mapping that a checkpoint's config has of it, or "none".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    rules: tuple[Rule, ...] = Field(min_length=1)
    fallback: str = "w8a16-channel"
    moe_calibrate_all_experts: bool = False
    allocate: Allocate | None = None
    rotation: Rotation | None = None
    format: str | None = None
    kv_cache_scheme: str | None = None

    @field_validator("rotation", mode="before")
    @classmethod
    def _can_be_rotated(cls, value: Any) -> Any:
        return rotation_named(value)

    @field_validator("format")
    @classmethod
    def _is_written(cls, value: str | None) -> str | None:
        try:
            return value and get_format(value).name
        except UsageError as error:
            raise RecipeError(str(error)) from error

    @field_validator("kv_cache_scheme", mode="before")
    @classmethod
    def _can_be_calibrated(cls, value: Any) -> str | None:
        return kv_cache_name(value)

    @field_validator("fallback")
    @classmethod
    def _exists(cls, value: str) -> str:
        parse_scheme(value)
        return value

    @classmethod
    def load(cls, name: str) -> Recipe:
        """A shipped recipe by name, or a YAML file by path.

        Raises:
            UsageError: there is no such recipe.
            RecipeError: it is not valid; the message names the key and what would work.
        """
        return cls.parse(recipe_text(name), str(name))

    @classmethod
    def parse(cls, text: str, origin: str) -> Recipe:
        """A recipe from YAML text; `origin` names it in errors."""
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {origin} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"recipe {origin} holds {type(content).__name__}, not a mapping with name and rules")
        try:
            recipe = cls.model_validate(content)
            for rule in recipe.rules:
                _check_methods(rule)
        except ValidationError as error:
            raise RecipeError(f"recipe {origin}: {_first_problem(error)}") from error
        except RecipeError as error:
            raise RecipeError(f"recipe {origin}: {error}") from error
        return recipe

    def rule_for(self, layer: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(layer)), None)

    def to_yaml(self) -> str:
        """The recipe as it is in force, the user's changes included."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def changed(
        self, *, overrides: tuple[str, ...] = (), ignore: tuple[str, ...] = (), group_size: int | None = None, budget: Budget | None = None,
        kv_cache: str | None = None, rotation: str | None = None, moe_calibrate_all_experts: bool | None = None,
    ) -> Recipe:  # fmt: skip
        """This recipe with the command line's wishes in front.

        Args:
            overrides: "REGEX=scheme" each; rounding and transforms stay those of the first rule that quantizes.
            ignore: patterns of layers that keep their own type.
            group_size: for every quantized rule and every override that names no group; strict, as is a group named in an override.
            budget: for an allocation, in place of the recipe's own; what is overridden is then fixed.
            kv_cache, rotation: in place of the recipe's own, "none" for none.
            moe_calibrate_all_experts: None leaves it as the recipe says.

        Raises:
            UsageError: an override or pattern is not valid, or a rule's activations are quantized, whose weights have one scale a channel.
        """
        try:
            rules = list(self.rules)
            if group_size is not None:
                rules = [_regrouped(rule, group_size) for rule in rules]
            front = [Rule(pattern=checked_pattern(pattern), scheme="none") for pattern in ignore]
            usual = next((rule for rule in self.rules if rule.scheme != "none"), self.rules[0])
            for override in overrides:
                pattern, separator, scheme = override.rpartition("=")
                if not separator or not pattern:
                    raise UsageError(f"override {override!r} is not of the form 'REGEX=scheme'; an example is 'down_proj=w8a16'")
                parse_scheme(scheme)
                strict = bool(re.search(r"-g\d+$", scheme))
                how = {"rounding": usual.rounding, "transforms": usual.transforms}
                rule = Rule(pattern=checked_pattern(pattern), scheme=scheme, strict=strict, **how)
                says_group = strict or scheme.endswith("-channel") or not takes_group(parse_scheme(scheme))
                front.append(rule if group_size is None or says_group else _regrouped(rule, group_size))
            allocate = self._allocating(group_size, budget)
            if allocate is not None:
                front = [rule.model_copy(update={"candidates": ()}) for rule in front]
            shows_all = self.moe_calibrate_all_experts if moe_calibrate_all_experts is None else moe_calibrate_all_experts
            cache = self.kv_cache_scheme if kv_cache is None else kv_cache_name(kv_cache)
            update = {
                "rules": tuple(front + rules), "allocate": allocate, "moe_calibrate_all_experts": shows_all, "kv_cache_scheme": cache,
                "rotation": self.rotation if rotation is None else rotation_named(rotation),
            }  # fmt: skip
            return self.model_copy(update=update)
        except RecipeError as error:  # the same words stand for a recipe's own content where that is wrong
            raise UsageError(str(error)) from error

    def _allocating(self, group_size: int | None, budget: Budget | None) -> Allocate | None:
        if self.allocate is None and budget is None:
            return None
        allocate = self.allocate or Allocate()
        update: dict[str, Any] = {"candidates": _candidates_regrouped(allocate.candidates, group_size)}
        if budget is not None:
            amount = f"file:{budget.amount:g}" if budget.kind == "file" else budget.amount
            update |= {"target_bpw": None, "max_kl": amount} if budget.kind == "kl" else {"target_bpw": amount, "max_kl": None}
        return allocate.model_copy(update=update)


def recipe_text(name: str) -> str:
    """What stands in the file of a shipped recipe, or in one given by its path; not checked.

    Raises:
        UsageError: there is no such recipe or file.
        RecipeError: it is no text.
    """
    shipped = {path.stem: path for path in packaged("recipes").glob("*.yaml")}
    path = shipped.get(name, Path(name))
    if name not in shipped and path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"unknown recipe {name!r}; {did_you_mean(name, shipped)}")
    if not path.is_file():
        raise UsageError(f"no recipe file {name}; give a YAML file, or one of {', '.join(sorted(shipped))}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {name} cannot be read: {error}; save it as UTF-8 text") from error


def list_recipes() -> list[Recipe]:
    """Every shipped recipe, by name."""
    return [Recipe.load(path.stem) for path in sorted(packaged("recipes").glob("*.yaml"))]


def checked_pattern(pattern: str) -> str:
    """The pattern, if it is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    return pattern


def _regrouped(rule: Rule, group_size: int) -> Rule:
    scheme: Scheme = parse_scheme(rule.scheme)
    if scheme.weight is None or (scheme.weight.group == CHANNEL == group_size):
        return rule
    if not takes_group(scheme):
        shared = "one scale a channel" if scheme.weight.group == CHANNEL else "the groups of their format"
        raise RecipeError(f"group size {group_size} is not for {rule.scheme}, whose weights have {shared}; leave --group-size out")
    candidates = _candidates_regrouped(rule.candidates, group_size)
    return rule.model_copy(update={"scheme": with_group(scheme, group_size).name, "strict": group_size != CHANNEL, "candidates": candidates})


def _candidates_regrouped(candidates: tuple[str, ...] | None, group_size: int | None) -> tuple[str, ...] | None:
    """Candidates at the user's group size, those that have a group of their own choice."""
    if candidates is None or group_size is None:
        return candidates
    schemes = {name: parse_scheme(name) for name in candidates}
    return tuple(dict.fromkeys(with_group(each, group_size).name if takes_group(each) else name for name, each in schemes.items()))


def _name(method: str | dict[str, Any]) -> str:
    return method if isinstance(method, str) else str(method.get("name"))


def _settings(method: str | dict[str, Any]) -> dict[str, Any]:
    return {} if isinstance(method, str) else {k: v for k, v in method.items() if k != "name"}


def _check_methods(rule: Rule) -> None:
    from quantkit.methods.registry import get_rounding, get_transform

    given = [("rounding", rule.rounding, "gptq, damp: 0.02"), *(("transform", transform, "awq, grid: 20") for transform in rule.transforms)]
    for kind, method, example in given:
        if isinstance(method, dict) and not isinstance(method.get("name"), str):
            raise RecipeError(f"{kind} {method} has no name; write it as {{name: {example}}}")
    if rule.scheme != "none":
        get_rounding(rule.rounding_name, rule.rounding_settings)
    for name, settings in rule.transform_settings:
        if name in ROTATIONS:
            raise RecipeError(f"{name} rotates the whole model, not the layers of a rule; write `rotation: {name}` beside the rules")
        get_transform(name, settings)
    if len(rule.transforms) > 1:
        names = " and ".join(name for name, _ in rule.transform_settings)
        raise RecipeError(f"{names} each choose the scale of the same inputs; keep one of them")


_PARTS: dict[str, type[BaseModel]] = {"rules": Rule, "allocate": Allocate, "rotation": Rotation}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = set(_PARTS.get(str(problem["loc"][0]), Recipe).model_fields) - {"strict"}
        return f"unknown key {where!r}; {did_you_mean(str(problem['loc'][-1]), known)}"
    return f"{where}: {problem['msg'].replace('tuple', 'list').replace('Tuple', 'List').replace('dictionary or instance of Rule', 'mapping')}"
