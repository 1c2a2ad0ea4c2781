"""The first entry that matches speaks, exact names cost a look-up, and a checkpoint that names all its layers opens at once."""

from __future__ import annotations

import re
import time

import pytest
import torch

from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import plan_shapes
from quantkit.formats.name_patterns import NamePatterns, Targets
from quantkit.formats.registry import FORMATS

NAMES = ["a.0.q_proj", "a.0.k-proj", "a.10.q_proj", "b"]


@pytest.mark.parametrize(
    "regexes",
    [
        [r"^a\.0\.q_proj$", r"a\..*"],
        [r"a\..*", r"^a\.0\.q_proj$"],
        [r".*q_proj$", r"^a\.0\.k\-proj$", r"^a\.0\.k-proj$", r"^a.0.q_proj$"],
        [r"^b$", r"^b$|a", r"^a\.10\.", r"0"],
        [r"^a\.0\.q_proj", r"^\d$", r"^$"],
    ],
    ids=str,
)
def test_the_first_match_is_that_of_trying_each_in_turn(regexes: list[str]) -> None:
    patterns = NamePatterns({f"+:{regex}": regex for regex in regexes})

    for name in NAMES:
        assert patterns.first(name) == next((f"+:{regex}" for regex in regexes if re.match(regex, name)), None), name
    assert sorted(patterns.idle(NAMES)) == sorted(f"+:{regex}" for regex in regexes if not any(re.match(regex, name) for name in NAMES))


def test_targets_are_names_patterns_or_all() -> None:
    targets = Targets(["b", r"re:a\.\d\.", "re:z", "c"])

    assert [name in targets for name in NAMES] == [True, True, False, True]
    assert targets.idle(NAMES) == ["c", "re:z"]
    assert "anything" in Targets(["Linear"]) and Targets(["Linear"]).idle(NAMES) == []


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(FormatError, match=r"has '\+:\*', which is no regular expression"):
        NamePatterns({"+:*": "*"})


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.holds_mixed])
def test_thousands_of_excepted_layers_open_in_no_time(name: str) -> None:
    schemes = [parse_scheme(s) for s in ("w4a16", "w8a16", "w4a16-g64")]
    layers = {f"model.layers.{i // 100}.mlp.experts.{i % 100}.down_proj": schemes[i % 3] for i in range(6000)}
    parts = plan_shapes(FORMATS[name], schemes[0], (128, 128), torch.float16)
    config = FORMATS[name].config(layers, ignored=[f"model.layers.{i}.self_attn.q_proj" for i in range(1000)])
    started = time.process_time()

    assert FORMATS[name].read_config(config, [f"{layer}.{part}" for layer in layers for part in parts], dict.get) == layers

    assert time.process_time() - started < 5
