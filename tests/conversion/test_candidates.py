"""A candidate that the engine would reject is dropped by name before anything is measured; the run is refused only where too little is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.errors import FormatError, UsageError
from quantkit.formats.summary import summarize
from tests.conversion.conftest import save_tiny

Options = Callable[..., ConvertOptions]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every linear has inputs in multiples of 128."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "wide", hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.mark.parametrize("budget", [{"target_bpw": 5.5}, {"max_kl": 5.0}], ids=["bits", "KL"])
def test_the_output_is_made_of_what_the_engine_loads_and_the_rest_is_named(
    budget: dict[str, float], wide: Path, tmp_path: Path, options: Options
) -> None:
    report = convert(str(wide), tmp_path / "out", options(target_engines=("sglang",), **budget))

    assert {layer.scheme for layer in report.layers} <= {"w4a16", "w8a16"}
    for bits in (2, 3, 5, 6):
        assert any(note.startswith(f"w{bits}a16 is no candidate: SGLang") and f"here are layers of {bits}" in note for note in report.notes)
    assert next(found.loads for found in summarize(tmp_path / "out").verdicts if found.engine == "SGLang")


def test_several_engines_leave_what_all_of_them_load(wide: Path, options: Options) -> None:
    allocation = plan_conversion(str(wide), options(target_bpw=5.5, target_engines=("transformers", "vllm", "tgi"))).allocation

    assert allocation is not None and {tuple(unit.options) for unit in allocation.problem.units} == {("w4a16", "w8a16")}


def test_a_candidate_is_dropped_only_where_the_engine_rejects_it(stories: Path, options: Options) -> None:
    """No group divides down_proj's 172 columns, and what 2 bits come to there, the fallback's 8 a channel, SGLang loads."""
    prepared = plan_conversion(str(stories), options(target_bpw=5.5, target_engines=("sglang",)))

    assert prepared.allocation is not None
    kept = {unit.name: list(unit.options) for unit in prepared.allocation.problem.units}
    assert {tuple(options) for name, options in kept.items() if "down_proj" in name} == {("w2a16",)}
    assert {tuple(options) for name, options in kept.items() if "down_proj" not in name} == {("w4a16", "w8a16")}
    assert any(note.startswith("w2a16 is no candidate for model.layers.0.self_attn.qkv_proj and 14 more: SGLang") for note in prepared.plan.notes)


REFUSED = {
    "container": (
        {"target_engines": ("gptqmodel",)}, FormatError, r"no candidate is left for .*qkv_proj and 7 more: w2a16, .* are no candidates: GPTQModel",
    ),
    "one is left": (
        {"target_engines": ("sglang",), "recipe": "THREE"}, FormatError, r"nothing to allocate, as w4a16 alone is left: w2a16 is no candidate",
    ),
    "budget": (
        {"target_engines": ("sglang",), "target_bpw": 3}, UsageError, r"below .*; the nearest that works is 4\.\d+.*; w2a16 is no candidate: SGLang",
    ),
    "mixture": (
        {"target_engines": ("llama.cpp",), "format": "gptq"}, FormatError, r"would not load w2a16, .* side by side in gptq: reads one bit width",
    ),
    "fixed": ({"target_engines": ("sglang",), "overrides": ("o_proj=w3a16",)}, FormatError, r"here are layers of 3; leave the budget out"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_too_little_is_left_for_is_refused_before_work(case: str, wide: Path, tmp_path: Path, options: Options) -> None:
    settings, kind, message = REFUSED[case]
    if settings.get("recipe") == "THREE":
        recipe = tmp_path / "three.yaml"
        recipe.write_text("name: three\nallocate: {candidates: [w2a16, w3a16, w4a16]}\nrules: [{pattern: .*, scheme: w4a16, rounding: rtn}]")
        settings = settings | {"recipe": str(recipe)}
    before = sorted(tmp_path.iterdir())

    with pytest.raises(kind, match=message):
        convert(str(wide), tmp_path / "out", options(**{"target_bpw": 4.5} | settings))
    assert sorted(tmp_path.iterdir()) == before
