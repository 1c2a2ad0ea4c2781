"""Engines that join layers find the scheme of the joint one under its own name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.verify import verify
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.fusion import with_one_input_scale, with_one_range
from quantkit.formats.registry import FORMATS
from tests.conversion.conftest import save_tiny

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
NAMES = [*(f"{ATTENTION}{n}_proj" for n in "qkvo"), *(f"{MLP}{n}_proj" for n in ("gate", "up", "down"))]

WIDTHS = {"none": 0, "w4a16": 4, "w8a16": 8}


def config(**schemes: str) -> dict:
    """Every layer w4a16 but for these, "none" for ignored."""
    chosen: dict[str, Scheme] = {n: parse_scheme(schemes.get(n.rpartition(".")[2].removesuffix("_proj"), "w4a16")) for n in NAMES}
    layers = {name: scheme for name, scheme in chosen.items() if scheme.is_quantized}
    return FORMATS["gptq"].config(layers, [name for name in chosen if name not in layers] + ["lm_head"])


def vllm_bits(config: dict, prefix: str) -> int:
    """What vLLM's get_dynamic_override gives a layer; 0 for unquantized."""
    for pattern, override in config.get("dynamic", {}).items():
        if pattern.startswith("-:") and re.match(pattern.removeprefix("-:"), prefix):
            return 0
        if re.match(pattern.removeprefix("+:"), prefix):
            return override["bits"]
    return config["bits"]


@pytest.mark.parametrize(
    ("schemes", "qkv", "gate_up"),
    [
        ({}, 4, 4),
        ({"q": "w8a16", "k": "w8a16", "v": "w8a16"}, 8, 4),
        ({"gate": "none", "up": "none"}, 4, 0),
        ({"q": "none", "k": "none", "v": "none", "gate": "w8a16", "up": "w8a16"}, 0, 8),
        ({"o": "w8a16", "down": "none"}, 4, 4),
        ({"v": "w8a16"}, 4, 4),
    ],
    ids=["uniform", "attention", "ignored", "both", "neither", "unlike members"],
)
def test_joint_layers_are_named_where_their_members_agree(schemes: dict[str, str], qkv: int, gate_up: int) -> None:
    written = config(**schemes)

    assert (vllm_bits(written, f"{ATTENTION}qkv_proj"), vllm_bits(written, f"{MLP}gate_up_proj")) == (qkv, gate_up)
    own = {name: vllm_bits(written, name) for name in NAMES}
    assert own == {name: WIDTHS[schemes.get(name.rpartition(".")[2].removesuffix("_proj"), "w4a16")] for name in NAMES}


def test_experts_are_not_named_jointly() -> None:
    layers = {f"model.layers.0.mlp.experts.0.{n}_proj": parse_scheme("w8a16" if n != "down" else "w4a16") for n in ("gate", "up", "down")}

    assert not any("gate_up" in entry for entry in FORMATS["gptq"].config(layers, []).get("dynamic", {}))


def test_a_conversion_with_joint_names_reads_back_and_verifies(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    options = ConvertOptions(recipe="w4a16-rtn", format="gptq", overrides=("[qkv]_proj=w8a16-channel",), ignore=("gate_proj|up_proj",))

    convert(str(source), tmp_path / "out", options)

    result = verify(tmp_path / "out", against=str(source))
    assert result.ok, result.checks


def test_what_shares_a_range_or_an_input_scale_is_told_by_the_names() -> None:
    expert = "model.layers.0.mlp.experts.{}.{}"
    experts = [expert.format(number, leaf) for number in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")]

    ranges, inputs = with_one_range([*NAMES, *experts]), with_one_input_scale([*NAMES, *experts])

    dense = [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]]
    assert ranges == [*dense, experts[:2], experts[2:3], experts[3:5], experts[5:]]
    assert inputs == [*dense, [*experts[:2], *experts[3:5]], [experts[2], experts[5]]]
