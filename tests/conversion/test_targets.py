"""An output that an engine it is meant for would reject is refused before any work, with the nearest that the engine loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.targets import stored_by
from quantkit.errors import FormatError, UsageError
from quantkit.formats.engines import Verdict, verdicts
from quantkit.formats.summary import summarize
from tests.conversion.conftest import save_tiny


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every linear has inputs in multiples of 128."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "wide", hidden_size=128, intermediate_size=256, head_dim=32)


REFUSED = {
    "zero points": (
        {"recipe": "w4a16-asym-gptq", "format": "gptq"}, "vllm", r"vLLM 0\.33 would not load gptq-v2 with 14 layers of w4a16-asym: reads symmetric "
        r"weights only; model\.layers\.0\.self_attn\.q_proj and 13 more have zero points; nearest that it loads: the same layers with --format "
        r"compressed-tensors",
    ),
    "container": (
        {"recipe": "nf4", "format": "bitsandbytes"}, "vLLM", "a plugin does; nearest that it loads: w4a16, as by --format compressed-tensors "
        r"--override '\.=w4a16'",
    ),
    "bits": (
        {"recipe": "w3a16-gptq"}, "SGLang", "reads 4 and 8 bits, and here are layers of 3; nearest that it loads: the same layers with --format gptq",
    ),
    "activations": ({"recipe": "w4a8"}, "sglang", "outside experts; nearest that it loads: w4a16"),
    "two schemes": ({"recipe": "w4a16-rtn", "overrides": ("v_proj=w8a16",)}, "vllm", "joins layers that have unlike schemes here: .*q_proj is w4a16"),
    "awq": ({"recipe": "w4a16-asym-gptq", "format": "awq"}, "llama.cpp", "reads no AWQ; nearest that it loads: the same layers with --format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_would_reject_is_refused_with_the_nearest(case: str, wide: Path, tmp_path: Path) -> None:
    settings, engine, message = REFUSED[case]

    with pytest.raises(FormatError, match=message):
        convert(str(wide), tmp_path / "out", ConvertOptions(target_engines=(engine,), **settings))
    assert not list(tmp_path.iterdir())


def test_every_one_of_several_engines_is_asked(wide: Path) -> None:
    with pytest.raises(FormatError, match=r"llama\.cpp .* would not load awq"):
        plan_conversion(str(wide), ConvertOptions(recipe="w4a16-asym-gptq", format="awq", target_engines=("vllm", "sglang", "llama.cpp")))


def test_what_an_engine_would_say_of_a_move_is_asked_too(peers: Path) -> None:
    with pytest.raises(FormatError, match=r"refuses desc_act .*nearest that it loads"):
        plan_conversion(str(peers / "gptq_b4_g64_desc"), ConvertOptions(format="gptq", target_engines=("vllm",)))


def test_what_it_takes_to_load_is_noted(wide: Path) -> None:
    plan = plan_conversion(str(wide), ConvertOptions(recipe="w4a8", target_engines=("vllm", "transformers"))).plan

    assert [note.partition(": ")[0] for note in plan.notes] == ["for vLLM 0.33", "for transformers 5.24"]


def test_an_unknown_engine_is_refused_with_a_near_name() -> None:
    with pytest.raises(UsageError, match=r"unknown engine 'vlm'; did you mean 'vllm'"):
        ConvertOptions(target_engines=("vlm",))


PLANNED: list[dict[str, Any]] = [
    {"recipe": "w4a16-rtn"}, {"recipe": "w4a16-asym-gptq", "format": "gptq"}, {"recipe": "fp8-dynamic"}, {"recipe": "nf4", "format": "bitsandbytes"},
    {"recipe": "w4a16-rtn", "overrides": ("down_proj=w8a16",)}, {"recipe": "w4a16-rtn", "ignore": ("o_proj",), "format": "gptq"}, {"format": "bf16"},
]  # fmt: skip


@pytest.mark.parametrize("settings", PLANNED, ids=lambda settings: "-".join(map(str, settings.values())))
def test_verdicts_on_a_plan_are_those_on_what_is_written(settings: dict[str, Any], wide: Path, tmp_path: Path, tokens: Path) -> None:
    options = ConvertOptions(calibration=CalibrationOptions(source=str(tokens), num_samples=4), measure=False, **settings)
    prepared = plan_conversion(str(wide), options)

    convert(str(wide), tmp_path / "out", options)

    planned = verdicts(stored_by(prepared.plan, options.carried_dtype or prepared.source.dtype))
    found = summarize(tmp_path / "out").verdicts
    assert [(v.engine, v.loads, _rule(v), len(v.notes)) for v in planned] == [(v.engine, v.loads, _rule(v), len(v.notes)) for v in found]


def _rule(verdict: Verdict) -> str:
    """Its words without the layer that is named, which is the first in another order."""
    return verdict.reason.partition(";")[0]


@pytest.mark.parametrize(
    ("name", "container", "instead", "works"),
    [
        ("gptq_b4_g64_desc", "gptq", "--format compressed-tensors --requantize", {"format": "compressed-tensors", "requantize": True}),
        ("bnb_nf4_dq", "bitsandbytes", "--override '.=w4a16' --requantize", {"overrides": (".=w4a16",), "requantize": True}),
    ],
)  # fmt: skip
def test_what_is_advised_for_codes_that_are_kept_can_be_followed(name: str, container: str, instead: str, works: dict, peers: Path) -> None:
    with pytest.raises(FormatError, match=re.escape(instead)):
        plan_conversion(str(peers / name), ConvertOptions(format=container, target_engines=("vllm",)))

    assert plan_conversion(str(peers / name), ConvertOptions(**works, target_engines=("vllm",))).plan.layers


def test_an_override_that_stands_in_the_way_is_named(tiny: Path) -> None:
    with pytest.raises(FormatError, match=r"--override '.=\S+' in place of 'q_proj=w8a16'"):
        plan_conversion(str(tiny), ConvertOptions(recipe="w4a16-rtn", group_size=32, overrides=("q_proj=w8a16",), target_engines=("vllm",)))
