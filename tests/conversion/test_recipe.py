"""Recipes: the first rule that matches decides, the user's wishes come first, and nothing unknown passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.conversion.recipe import Recipe, list_recipes
from quantkit.errors import RecipeError, UsageError

RULES = """
name: mine
rules:
  - {pattern: "layers\\\\.0\\\\.", scheme: w8a16, rounding: rtn}
  - {pattern: down_proj, scheme: none}
  - {pattern: ".*", scheme: w4a16, rounding: {name: gptq, damp: 0.05}}
"""


def scheme(recipe: Recipe, layer: str) -> str | None:
    rule = recipe.rule_for(layer)
    return rule and rule.scheme


def test_every_shipped_recipe_loads_under_its_own_name() -> None:
    recipes = list_recipes()

    assert {"w4a16-gptq", "w4a16-rtn", "w8a8-int8"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        assert Recipe.load(recipe.name) == recipe and recipe.description.endswith(".")


def test_the_first_rule_that_matches_decides() -> None:
    recipe = Recipe.parse(RULES, "mine")

    assert scheme(recipe, "model.layers.0.mlp.down_proj") == "w8a16"
    assert scheme(recipe, "model.layers.1.mlp.down_proj") == "none"
    assert scheme(recipe, "model.layers.1.mlp.up_proj") == "w4a16"
    assert Recipe.parse(RULES.replace('".*"', "up_proj"), "mine").rule_for("model.layers.1.mlp.gate_proj") is None


def test_a_rounding_s_settings_are_read() -> None:
    rule = Recipe.parse(RULES, "mine").rules[2]

    assert (rule.rounding_name, rule.rounding_settings) == ("gptq", {"damp": 0.05})


def test_what_is_ignored_comes_before_overrides_and_both_before_the_recipe() -> None:
    recipe = Recipe.parse(RULES, "mine").changed(overrides=("up_proj=w3a16-g64", "layers=w2a16"), ignore=(r"layers\.1\.",))

    assert scheme(recipe, "model.layers.1.mlp.up_proj") == "none"
    assert scheme(recipe, "model.layers.0.mlp.up_proj") == "w3a16-g64"
    assert scheme(recipe, "model.layers.0.mlp.down_proj") == "w2a16"


def test_an_override_takes_the_rounding_of_the_first_rule_that_has_one() -> None:
    recipe = Recipe.parse("name: a\nrules: [{pattern: x, scheme: none}, {pattern: .*, scheme: w4a16, rounding: gptq}]", "a")

    assert recipe.changed(overrides=("up_proj=w8a16",)).rules[0].rounding == "gptq"
    assert Recipe.load("w4a16-awq").changed(overrides=("up_proj=w8a16",)).rules[0].transforms == ("awq",)


def test_a_pattern_may_hold_an_equals_sign() -> None:
    assert Recipe.load("w4a16-rtn").changed(overrides=("(?=x)up=w8a16",)).rules[0].pattern == "(?=x)up"


def test_a_group_size_applies_to_every_quantized_rule_and_is_strict() -> None:
    recipe = Recipe.parse(RULES, "mine").changed(group_size=32)

    assert [(rule.scheme, rule.strict) for rule in recipe.rules] == [("w8a16-g32", True), ("none", False), ("w4a16-g32", True)]
    assert [rule.scheme for rule in recipe.changed(group_size=-1).rules] == ["w8a16-channel", "none", "w4a16-channel"]


def test_a_group_size_is_refused_where_activations_are_quantized() -> None:
    assert Recipe.load("w8a8-int8").changed(group_size=-1).rules == Recipe.load("w8a8-int8").rules
    with pytest.raises(UsageError, match="group size 32 is not for w8a8-int8, whose weights have one scale a channel"):
        Recipe.load("w8a8-int8").changed(group_size=32)


@pytest.mark.parametrize(
    ("override", "expected"),
    [("a=w8a16", "w8a16-g32"), ("a=w8a16-g64", "w8a16-g64"), ("a=w8a16-channel", "w8a16-channel"), ("a=w8a8-int8", "w8a8-int8"), ("a=none", "none")],
)
def test_a_group_size_reaches_overrides_that_name_none(override: str, expected: str) -> None:
    rule = Recipe.load("w4a16-rtn").changed(overrides=(override,), group_size=32).rules[0]

    assert rule.scheme == expected and rule.strict is ("-g" in expected)


@pytest.mark.parametrize(("override", "is_strict"), [("a=w4a16-g64", True), ("a=w4a16", False), ("a=w4a16-channel", False)])
def test_only_a_group_that_was_named_is_strict(override: str, is_strict: bool) -> None:
    assert Recipe.load("w4a16-rtn").changed(overrides=(override,)).rules[0].strict is is_strict


def test_a_recipe_written_out_reads_back() -> None:
    for recipe in (*list_recipes(), Recipe.parse(RULES, "mine").changed(overrides=("up=w8a16",), ignore=("v_proj",))):
        assert Recipe.parse(recipe.to_yaml(), "again") == recipe


def test_a_file_may_be_given_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(RULES)

    assert Recipe.load(str(tmp_path / "mine.yml")) == Recipe.parse(RULES, "mine")


def rule(**keys: str) -> str:
    fields = {"pattern": "a", "scheme": "w4a16"} | keys
    return "name: x\nrules: [{" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}]"


INVALID = {
    "empty": ("", "holds NoneType, not a mapping"),
    "a list": ("[]", "holds list, not a mapping with name and rules"),
    "no YAML": ("\t{", "is not YAML"),
    "no name": (rule().removeprefix("name: x\n"), "name: Field required"),
    "no rules": ("name: x", "rules: Field required"),
    "empty rules": ("name: x\nrules: []", "rules: List should have at least 1 item"),
    "rules as mapping": ("name: x\nrules: {pattern: a}", "rules: Input should be a valid list"),
    "a bare rule": ("name: x\nrules: [w4a16]", "rules.0: Input should be a valid mapping"),
    "unknown key": ("fallbck: none\n" + rule(), "unknown key 'fallbck'; did you mean 'fallback'?"),
    "key that is no word": ("1: none\n" + rule(), "Keys should be strings"),
    "unknown key of a rule": (rule(ronding="gptq"), "unknown key 'rules.0.ronding'; did you mean 'rounding'?"),
    "unknown scheme": (rule(scheme="w4a17"), "unknown scheme 'w4a17'; did you mean 'w4a16'"),
    "impossible bits": (rule(scheme="w7a16"), "7 bits are not supported"),
    "unknown fallback": ("fallback: w9\n" + rule(), "unknown scheme 'w9'"),
    "unknown rounding": (rule(rounding="gtpq"), "unknown rounding 'gtpq'; did you mean 'gptq'?"),
    "unknown setting": (rule(rounding="{name: gptq, dmap: 1}"), "no setting 'dmap'; did you mean 'damp'?"),
    "impossible setting": (rule(rounding="{name: gptq, damp: -1}"), "damp is -1"),
    "setting of another kind": (rule(rounding="{name: gptq, damp: little}"), "damp is 'little'"),
    "nameless rounding": (rule(rounding="{damp: 0.1}"), "has no name"),
    "unknown transform": (rule(transforms="[akw]"), "unknown transform 'akw'; did you mean 'awq'?"),
    "unknown setting of a transform": (rule(transforms="[{name: awq, gird: 1}]"), "transform 'awq' has no setting 'gird'; did you mean 'grid'?"),
    "impossible setting of a transform": (rule(transforms="[{name: awq, grid: 0}]"), "grid is 0; give a whole number from 1 on"),
    "nameless transform": (rule(transforms="[{grid: 20}]"), "transform {'grid': 20} has no name; write it as {name: awq"),
    "two scales for one input": (rule(transforms="[awq, awq]"), "awq and awq each choose the scale of the same inputs"),
    "broken pattern": (rule(pattern="'('"), r"pattern '(' is not a regular expression"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_recipe_names_itself_the_key_and_what_would_work(case: str) -> None:
    text, message = INVALID[case]

    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "mine.yaml")

    assert "recipe mine.yaml" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("name", ["w4a16-gtpq", "w4a16", "mine.txt", "", "../w4a16-gptq"])
def test_an_unknown_recipe_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown recipe .*w4a16-"):
        Recipe.load(name)


def test_a_recipe_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe")

    with pytest.raises(RecipeError, match=r"mine.yaml cannot be read.*UTF-8"):
        Recipe.load(str(tmp_path / "mine.yaml"))
    with pytest.raises(UsageError, match=r"no recipe file .*none.yaml; give a YAML file, or one of fp4, fp8-block"):
        Recipe.load(str(tmp_path / "none.yaml"))
