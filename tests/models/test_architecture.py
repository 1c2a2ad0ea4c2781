"""Configs that no model can be built from are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import SourceError
from quantkit.models.architecture import describe, load_config

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
WRONG = {
    "a word for a number": ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
    "a number for a table": ({"rope_scaling": 5}, "rope_parameters"),
    "sizes that do not divide": ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "an unknown activation": ({"hidden_act": "blah"}, "'blah'"),
    "an unknown type": ({"torch_dtype": "zzz"}, "zzz"),
    "a word for a list": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list|field 'architectures'"),
    "a number for a name": ({"architectures": [3]}, "not a list of names|field 'architectures'"),
    "too little for dbrx": ({"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]}, "cannot build 'dbrx'"),
    "too little for dots1": ({"model_type": "dots1", "architectures": ["Dots1ForCausalLM"]}, "cannot build 'dots1'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_config_with_wrong_values_is_named_with_the_problem(wrong: str, tmp_path: Path) -> None:
    changes, problem = WRONG[wrong]
    config: dict[str, Any] = LLAMA | changes
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(SourceError, match=problem) as caught:
        describe(load_config(tmp_path), set())

    assert str(tmp_path / "config.json") in str(caught.value)
