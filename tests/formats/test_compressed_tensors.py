"""Which of compressed-tensors' layers are read, and that no other is taken for one of them."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import FormatError
from quantkit.formats.compressed_tensors import CompressedTensors

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
UNREAD: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "asymmetric int8": ("int-quantized", {"symmetric": False}, ACTIVATIONS, "8-bit asymmetric weights per channel"),
    "int8 in groups": ("int-quantized", {"strategy": "group", "group_size": 64}, ACTIVATIONS, "8-bit symmetric weights per group"),
    "4 bits unpacked": ("int-quantized", {"num_bits": 4}, ACTIVATIONS, "4-bit symmetric weights"),
    "int8 weights alone": ("int-quantized", {}, None, "no activations quantized"),
    "static activations": ("int-quantized", {}, ACTIVATIONS | {"strategy": "tensor", "dynamic": False}, "strategy tensor, dynamic False"),
    "packed with int8 activations": ("pack-quantized", {"num_bits": 4}, ACTIVATIONS, "with 8-bit int activations"),
    "packed with FP8 activations": ("pack-quantized", {"num_bits": 4}, ACTIVATIONS | {"type": "float"}, "with 8-bit float activations"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_would_be_read_with_another_meaning_is_refused(case: str) -> None:
    layout, weights, activations, message = UNREAD[case]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    config = {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}}
    tensor = "weight_packed" if layout == "pack-quantized" else "weight_scale"

    with pytest.raises(FormatError, match=message):
        CompressedTensors().read_config(config, [f"model.layers.0.mlp.up_proj.{tensor}"])
