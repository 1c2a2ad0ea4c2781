"""Which of compressed-tensors' layers are read, and that no other is taken for one of them."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import FormatError
from quantkit.formats.compressed_tensors import CompressedTensors

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
UNREAD: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "int8 weights alone": ("int-quantized", {}, None, "layout 'int-quantized' with 8-bit symmetric int per channel weights, no activations"),
    "static int8 activations": ("int-quantized", {}, ACTIVATIONS | {"strategy": "tensor", "dynamic": False}, "int per tensor, dynamic False"),
    "4-bit activations": ("int-quantized", {}, ACTIVATIONS | {"num_bits": 4}, "activations of 4-bit"),
    "asymmetric activations": ("int-quantized", {}, ACTIVATIONS | {"symmetric": False}, "activations of 8-bit asymmetric"),
    "activations in columns": ("int-quantized", {}, ACTIVATIONS | {"strategy": "channel"}, "activations per channel"),
    "locally dynamic activations": ("int-quantized", {}, ACTIVATIONS | {"dynamic": "local"}, "dynamic local"),
    "6-bit floats": ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float"}, None, "6-bit symmetric float"),
    "asymmetric floats": ("float-quantized", {"type": "float", "symmetric": False}, None, "8-bit asymmetric float"),
    "an unknown key": ("pack-quantized", {"num_bits": 4, "rotation": "r3"}, None, "key 'rotation'"),
    "an unknown strategy": ("pack-quantized", {"num_bits": 4, "strategy": "diagonal"}, None, "strategy 'diagonal'"),
}
READ: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "asymmetric int8": ("int-quantized", {"symmetric": False}, ACTIVATIONS, "w8a8-asym-channel"),
    "int8 in groups": ("int-quantized", {"strategy": "group", "group_size": 64}, ACTIVATIONS, "w8a8-g64"),
    "4 bits unpacked": ("int-quantized", {"num_bits": 4}, ACTIVATIONS, "w4a8-channel"),
    "packed with int8 activations": ("pack-quantized", {"num_bits": 4}, ACTIVATIONS, "w4a8-channel"),
    "packed with FP8 activations": ("pack-quantized", {"num_bits": 4}, ACTIVATIONS | {"type": "float"}, "w4afp8-channel"),
    "FP8 by another name": ("naive-quantized", {"type": "float"}, ACTIVATIONS | {"type": "float"}, "fp8-dynamic"),
}


AROUND: dict[str, tuple[dict[str, Any], str]] = {
    "a rotation of inputs": (
        {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}},
        r"transforms at run time \(input\)",
    ),
    "a rotation of keys": (
        {"transform_config": {"config_groups": {"r3": {"apply": [{"location": "q_attn"}, {"location": "k_cache"}]}}}}, r"\(k_cache, q_attn\)",
    ),
    "a sparse layout": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config 'sparse-24-bitmask'"),
}  # fmt: skip
NOTHING: tuple[dict[str, Any], ...] = (
    {"transform_config": {}, "sparsity_config": {}},
    {"transform_config": None, "sparsity_config": None},
    {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}},
    {"transform_config": {"config_groups": {"r1": {"apply": [{"location": "weight_input"}, {"location": "weight_output", "inverse": True}]}}}},
)


def packed(**more: Any) -> dict[str, Any]:
    """A plain 4-bit configuration and what stands beside its groups."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more.pop("group", {})}}} | more


@pytest.mark.parametrize("case", AROUND)
def test_what_changes_layers_beside_their_weights_is_refused(case: str) -> None:
    more, message = AROUND[case]

    with pytest.raises(FormatError, match=message):
        CompressedTensors().read_config(packed(**more), ["a.weight_packed"], dict.get)


def test_quantized_outputs_are_refused() -> None:
    config = packed(group={"output_activations": {"num_bits": 8, "type": "int"}})

    with pytest.raises(FormatError, match="with output_activations is not read yet"):
        CompressedTensors().read_config(config, ["a.weight_packed"], dict.get)


@pytest.mark.parametrize("more", NOTHING, ids=["empty", "null", "dense", "in the weights"])
def test_what_changes_nothing_is_read(more: dict[str, Any]) -> None:
    assert CompressedTensors().read_config(packed(**more), ["a.weight_packed"], dict.get)["a"].name == "w4a16-g32"


@pytest.mark.parametrize("case", UNREAD)
def test_what_would_be_read_with_another_meaning_is_refused(case: str) -> None:
    layout, weights, activations, message = UNREAD[case]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    config = {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}}
    tensor = "weight_packed" if layout == "pack-quantized" else "weight_scale"

    with pytest.raises(FormatError, match=message):
        CompressedTensors().read_config(config, [f"model.layers.0.mlp.up_proj.{tensor}"], dict.get)


@pytest.mark.parametrize("case", READ)
def test_every_scheme_with_a_name_is_read(case: str) -> None:
    layout, weights, activations, scheme = READ[case]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    config = {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}}

    assert CompressedTensors().read_config(config, ["a.weight_scale"], dict.get)["a"].name == scheme
