"""What is not understood of another tool's checkpoint is refused with its name, before any work; nothing is half-read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.stored_layers import wrong_parts
from quantkit.formats.summary import summarize
from tests.conversion.conftest import edit_tensors

Q = "model.layers.0.self_attn.q_proj"
DYNAMIC = "+:.*k_proj"
KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq": ("gptq_b4_g128", {"turned": "by 90 degrees"}, "gptq has the key 'turned', which quantkit does not know"),
    "awq": ("awq_gemm_autoawq", {"foo": 1}, "awq has the key 'foo'"),
    "bitsandbytes": ("bnb_nf4_dq", {"foo": 1}, "bitsandbytes has the key 'foo'"),
    "fp8": ("hf_finegrained_fp8_handmade", {"foo": 1}, "fp8 has the key 'foo'"),
    "experts of 4 bits": ("hf_finegrained_fp8_handmade", {"expert_dtype": "fp4"}, "fp8 with expert_dtype 'fp4' is not read; quantkit reads fp8"),
    "compressed-tensors": ("ct_w4a16_gptq", {"foo": 1}, "compressed-tensors has the key 'foo'"),
    "a transform": ("ct_w4a16_gptq", {"transform_config": {"foo": 1}}, "transform_config has the key 'foo'"),
    "a rule for some layers": ("gptq_b4_g128", {"dynamic": {DYNAMIC: {"foo": 1}}}, "gptq dynamic has the key 'foo'"),
    "words of another size": ("gptq_b4_g128", {"pack_dtype": "int16"}, "gptq with pack_dtype 'int16' is not read; quantkit reads int32"),
    "the same of some layers": ("gptq_b4_g128", {"dynamic": {DYNAMIC: {"pack_dtype": "int8"}}}, "with pack_dtype 'int8' is not read"),
    "another tile": ("gptq_b4_g128", {"is_marlin_format": True}, "gptq with is_marlin_format True"),
    "two formats": ("gptq_b4_g128", {"format": "gptq_v2"}, "checkpoint_format is 'gptq' and format is 'gptq_v2'"),
    "two widths": ("awq_gemm_autoawq", {"w_bit": 3}, "AWQ bits is 4 and w_bit is 3"),
    "no zero points": ("awq_gemm_autoawq", {"zero_point": False}, "awq with zero_point False is not read"),
    "sparse": ("ct_w4a16_gptq", {"format": "marlin-24"}, "layout 'marlin-24'"),
    "no width": ("gptq_b4_g128", {"bits": None}, r"not understood \(.*None"),
    "a list": ("gptq_b4_g128", {"dynamic": [1]}, r"not understood \(AttributeError"),
}
TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a scale of channels": ("gptq_b4_g128", lambda t: t.update({f"{Q}.channel_scale": torch.ones(256)}), "channel_scale belongs to no w4a16 layer"),
    "a second scale": ("ct_w4a16_gptq", lambda t: t.update({f"{Q}.weight_global_scale": torch.ones(1)}), "weight_global_scale belongs to no w4a16"),
    "int8 without scales": ("bnb_int8", lambda t: t.pop(f"{Q}.SCB"), f"{Q}.weight is stored as int8, and no scales beside it"),
    "int8 without a scale": ("ct_w8a8_gptq", lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight is stored as int8, and no scales"),
    "floats without a scale": ("ct_fp8_dynamic", lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight is stored as float8_e4m3fn, and no"),
}
CODES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "an order beyond the groups": ("gptq_b4_g64_desc", lambda t: t[f"{Q}.g_idx"].fill_(99), "from 99 to 99; it names the group"),
    "a group before the first": ("gptq_b4_g64_desc", lambda t: t[f"{Q}.g_idx"].fill_(-1), "from -1 to -1; it names the group"),
    "zero points of a symmetric grid": (
        "ct_w4a16_gptq", lambda t: t.update({f"{Q}.weight_zero_point": torch.full((32, 2), 0x77777777, dtype=torch.int32)}),
        "a weight_zero_point is 7, not 8",
    ),
}  # fmt: skip


def copied(peers: Path, name: str, folder: Path) -> Path:
    return shutil.copytree(peers / name, folder / "source", copy_function=shutil.copyfile)


def configured(folder: Path, values: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    key = "quantization_config" if "quantization_config" in config else "compression_config"
    config[key] = {name: value for name, value in (config[key] | values).items()}
    if "format" in values and "config_groups" in config[key]:
        for group in config[key]["config_groups"].values():
            group["format"] = values["format"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_or_value_that_is_not_known_is_refused_by_name(kind: str, peers: Path, tmp_path: Path) -> None:
    name, values, message = KEYS[kind]
    source = configured(copied(peers, name, tmp_path), values)

    with pytest.raises(FormatError, match=message):
        plan_conversion(str(source), ConvertOptions(format="bf16"))
    assert next(verdict for verdict in summarize(source).verdicts if verdict.engine == "quantkit").loads is False


@pytest.mark.parametrize("values", [{"foo": None}, {"foo": False}, {"meta": {"anything": 1}}, {"iters": 200, "provider": "auto-round"}])
def test_what_is_not_used_and_what_only_tells_how_codes_were_made_is_no_obstacle(values: dict[str, Any], peers: Path, tmp_path: Path) -> None:
    source = configured(copied(peers, "gptq_b4_g128", tmp_path), values)

    assert len(OpenedCheckpoint(source).schemes) == 28


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_is_not_known_or_lacks_its_scales_is_refused_by_name(kind: str, peers: Path, tmp_path: Path) -> None:
    name, change, message = TENSORS[kind]
    source = edit_tensors(copied(peers, name, tmp_path), change)

    with pytest.raises(FormatError, match=message):
        OpenedCheckpoint(source)


@pytest.mark.parametrize("kind", CODES)
def test_a_layer_that_contradicts_itself_is_not_decoded(kind: str, peers: Path, tmp_path: Path) -> None:
    name, change, message = CODES[kind]
    source = edit_tensors(copied(peers, name, tmp_path), change)

    with pytest.raises(FormatError, match=message):
        OpenedCheckpoint(source).quantized(Q)


def test_zero_points_that_some_tools_write_for_symmetric_layers_are_taken(peers: Path, tmp_path: Path) -> None:
    source = edit_tensors(copied(peers, "ct_fp8_dynamic", tmp_path), lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(256, 1)}))

    assert len(OpenedCheckpoint(source).schemes) == 28


def test_an_order_that_is_promised_and_absent_is_asked_for(peers: Path, tmp_path: Path) -> None:
    source = copied(peers, "gptq_b4_g64_desc", tmp_path)
    kept = {name: value for name, value in load_file(source / "model.safetensors").items() if name != f"{Q}.g_idx"}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(FormatError, match=f"desc_act is true, and {Q} has no g_idx"):
        OpenedCheckpoint(source)


@pytest.mark.parametrize(("name", "bits"), [("gptq_b4_g128", 3), ("gptq_b3_g128", 4), ("gptq_b8_g128", 4)])
def test_words_of_another_width_than_the_config_says_are_told_from_headers(name: str, bits: int, peers: Path, tmp_path: Path) -> None:
    assert wrong_parts(OpenedCheckpoint(configured(copied(peers, name, tmp_path), {"bits": bits})))


@pytest.mark.parametrize("name", ["ct_w4a16_gptq", "gptq_b4_g128", "awq_gemm_autoawq", "bnb_int8"])
def test_a_quantized_layer_of_another_shape_than_the_model_s_is_refused_before_work(name: str, peers: Path, tmp_path: Path) -> None:
    source = copied(peers, name, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 1024}))

    for settings in ({"format": "bf16"}, {"format": "gptq"}, {"recipe": "w4a16-rtn", "requantize": True}):
        with pytest.raises(QuantkitError, match=r"mlp\..*_proj.weight is \[.*512.*\] where config.json asks for \[.*1024.*\]"):
            plan_conversion(str(source), ConvertOptions(**settings))
