"""A quantized model goes into another container value for value, judged by decoders that share nothing with ours; or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from evals.peers.decode import decode_folder
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import FormatError, SourceError, UsageError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.summary import summarize
from tests.conversion.conftest import contents, edit_config, edit_tensors, save_tiny
from tests.conversion.test_resume import stopped

LOSSLESS = [
    ("gptq_b4_g128", "compressed-tensors", "w4a16"),
    ("gptq_b4_g128", "awq", "w4a16-asym"),
    ("gptq_b4_g128", "gptq", "w4a16"),
    ("gptq_b3_g128", "compressed-tensors", "w3a16"),
    ("gptq_b8_g128", "compressed-tensors", "w8a16"),
    ("gptq_b4_g64_desc", "gptq", "w4a16-g64"),
    ("awq_gemm_autoawq", "compressed-tensors", "w4a16-asym"),
    ("awq_gemm_autoawq", "gptq", "w4a16-asym"),
    ("ct_w4a16_gptq", "gptq", "w4a16"),
    ("ct_w4a16_gptq", "awq", "w4a16-asym"),
    ("ct_w4a16_asym_awq", "gptq", "w4a16-asym"),
    ("ct_w4a16_asym_awq", "awq", "w4a16-asym"),
    ("ct_w8a8_gptq", "compressed-tensors", "w8a8-int8"),
    ("ct_nvfp4a16", "compressed-tensors", "nvfp4"),
    ("ct_fp8_dynamic", "compressed-tensors", "fp8-dynamic"),
    ("ct_fp8_block", "fp8", "fp8-block"),
    ("hf_finegrained_fp8_handmade", "compressed-tensors", "fp8-block"),
    ("bnb_nf4_dq", "bitsandbytes", "nf4-dq"),
    ("bnb_int8", "bitsandbytes", "int8"),
]


def options(container: str | None, **settings: Any) -> ConvertOptions:
    return ConvertOptions(format=container, **settings)


@pytest.mark.parametrize(("name", "container", "scheme"), LOSSLESS, ids=lambda value: value)
def test_a_peers_checkpoint_keeps_every_value_in_another_container(name: str, container: str, scheme: str, peers: Path, tmp_path: Path) -> None:
    report = convert(str(peers / name), tmp_path / "out", options(container))

    before, after = decode_folder(peers / name).tensors, decode_folder(tmp_path / "out").tensors
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert {s.name for s in OpenedCheckpoint(tmp_path / "out").schemes.values()} == {scheme}
    assert report.losslessness == "28 of 28 layers lossless" and all(layer.lossless for layer in report.layers)
    assert json.loads((tmp_path / "out" / "quantkit_report.json").read_text())["losslessness"] == "28 of 28 layers lossless"
    checked = verify(tmp_path / "out", against=str(peers / name), options=VerifyOptions(num_tokens=0))
    assert checked.ok and "28 of 28 layers" in next(check.detail for check in checked.checks if check.name == "lossless")
    assert next(v for v in summarize(tmp_path / "out").verdicts if v.engine == "quantkit").loads


@pytest.mark.parametrize(("name", "kind"), [("gptq_b4_g128", torch.float16), ("ct_w4a16_gptq", torch.bfloat16), ("awq_gemm_autoawq", torch.float16)])
def test_scales_keep_their_type_and_the_peers_library_unpacks_the_same_weights(name: str, kind: torch.dtype, peers: Path, tmp_path: Path) -> None:
    convert(str(peers / name), tmp_path / "out", options("compressed-tensors"))

    opened, expected = OpenedCheckpoint(tmp_path / "out"), decode_folder(peers / name).tensors
    (group,) = opened.reader.quantization_config["config_groups"].values()
    unpacker = BaseCompressor.get_value_from_registry(group["format"])
    for module in opened.schemes:
        stored = {part.removeprefix(f"{module}."): opened.reader.get(part) for part in opened.parts(module)}
        assert stored["weight_scale"].dtype == kind
        theirs = unpacker.decompress(stored, QuantizationScheme(**group))["weight"].float()
        torch.testing.assert_close(theirs, expected[f"{module}.weight"], rtol=2**-7, atol=1e-9)  # they compute in the scales' type


def test_there_and_back_gives_the_first_bytes(peers: Path, tmp_path: Path) -> None:
    convert(str(peers / "gptq_b4_g128"), tmp_path / "ct", options("compressed-tensors"))
    convert(str(tmp_path / "ct"), tmp_path / "gptq", options("gptq"))

    first, again = OpenedCheckpoint(peers / "gptq_b4_g128").reader, OpenedCheckpoint(tmp_path / "gptq").reader
    assert set(first.names) == set(again.names)
    assert all(torch.equal(first.get(name), again.get(name)) for name in first.names)


def test_an_activation_order_stays_with_its_label(peers: Path, tmp_path: Path) -> None:
    convert(str(peers / "gptq_b4_g64_desc"), tmp_path / "out", options("gptq"))

    config = OpenedCheckpoint(tmp_path / "out").reader.quantization_config
    assert config["desc_act"] is True and not config["static_groups"]


REFUSED = [
    ("gptq_b4_g64_desc", "compressed-tensors", "activation order (desc_act), which compressed-tensors has no place for", "into gptq", "w4a16-g64"),
    ("gptq_b3_g128", "awq", "4 bits with zero points, as in w4a16-asym, not w3a16", "into compressed-tensors or gptq", "w4a16-asym"),
    ("gptq_b4_g128", "fp8", "fp8 holds fp8-block", "into compressed-tensors or gptq or awq", "fp8-block"),
    ("ct_w8a8_gptq", "gptq", "stores no activation quantization", "into compressed-tensors", "w8a16-channel"),
    ("ct_fp8_dynamic", "fp8", "fp8 holds fp8-block, fp8-tensor, fp8-static", "into compressed-tensors", "fp8-block"),
    ("bnb_nf4_dq", "gptq", "gptq holds integers, not nf4-dq", "into bitsandbytes", "w4a16-g32"),
    ("bnb_int8", "compressed-tensors", "stored as bitsandbytes has it", "into bitsandbytes", "w8a16-channel"),
]


@pytest.mark.parametrize(("name", "container", "why", "elsewhere", "again"), REFUSED, ids=lambda value: value.replace(" ", "_")[:24])
def test_what_a_container_cannot_hold_is_refused_with_what_can(
    name: str, container: str, why: str, elsewhere: str, again: str, peers: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as refusal:
        convert(str(peers / name), tmp_path / "out", options(container))

    message = str(refusal.value)
    assert f"{container} cannot hold 28 of 28 layers of {name} without loss" in message and why in message
    assert elsewhere in message and f"--requantize quantizes them again, to {again}" in message
    assert not list(tmp_path.iterdir())


def with_a_small_scale(folder: Path) -> Path:
    """Bfloat16 scales, one of which float16 cannot hold: of layer 1's up_proj."""
    source = quantized(folder, recipe="w4a16-rtn", dtype="bfloat16")
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    return edit_tensors(source, lambda tensors: tensors[scale].view(-1)[3:4].fill_(3.0e-7))


def test_scales_that_another_type_would_change_are_refused_by_how_much(tmp_path: Path) -> None:
    source = with_a_small_scale(tmp_path)
    why = r"gptq cannot hold 1 of 14 layers .*up_proj: gptq stores the scales of its weight as float16, which changes 1 of"
    with pytest.raises(FormatError, match=why):
        convert(str(source), tmp_path / "out", options("gptq"))

    report = convert(str(source), tmp_path / "out", options("gptq", requantize=True))
    (lossy,) = [layer for layer in report.layers if not layer.lossless]
    assert lossy.name == "model.layers.1.mlp.up_proj" and 0 < lossy.max_error < 1e-3 and "quantized again" in lossy.note
    assert report.losslessness.startswith("13 of 14 layers lossless, 1 quantized again: off by up to ")
    before, after = decode_folder(source).tensors, decode_folder(tmp_path / "out").tensors
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.up_proj.weight"}
    assert lossy.max_error == pytest.approx(float((before[f"{lossy.name}.weight"] - after[f"{lossy.name}.weight"]).abs().max()))


@pytest.mark.parametrize(
    ("given", "told"),
    [({"source": "rows.txt"}, "so rows.txt is not read"), ({"num_samples": 3, "seq_len": 64}, "so num_samples and seq_len change nothing")],
)
@pytest.mark.parametrize("container", ["compressed-tensors", "bf16"])
def test_a_calibration_that_has_no_effect_is_told(container: str, given: dict[str, Any], told: str, peers: Path) -> None:
    plan = plan_conversion(str(peers / "gptq_b4_g128"), options(container, calibration=CalibrationOptions(**given))).plan

    assert f"a change of container needs no calibration, {told}" in plan.notes


def test_a_layer_found_changed_in_what_was_written_stops_the_move_whatever_headers_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_a_small_scale(tmp_path)
    monkeypatch.setattr("quantkit.conversion.moving.obstacle", lambda *_: None)  # as if a loss had not been foreseen

    with pytest.raises(FormatError, match=r"layers\.1.*up_proj would not be what it was in gptq: its weights change by up to .*; give a recipe"):
        convert(str(source), tmp_path / "out", options("gptq"))

    assert not (tmp_path / "out").exists()


def test_with_requantize_alone_layers_are_quantized_again_near_what_they_were(peers: Path, tmp_path: Path) -> None:
    report = convert(str(peers / "gptq_b3_g128"), tmp_path / "out", options("awq", requantize=True))

    assert report.losslessness.startswith("0 of 28 layers lossless, 28 quantized again")
    before, after = decode_folder(peers / "gptq_b3_g128").tensors, decode_folder(tmp_path / "out").tensors
    for layer in report.layers:
        w, q = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        assert layer.error == pytest.approx(float((w - q).square().sum() / w.square().sum()), rel=1e-4)
        assert layer.error < 0.01 and layer.max_error == pytest.approx(float((w - q).abs().max()))


def quantized(folder: Path, **settings: Any) -> Path:
    """A tiny model of ours, stored once."""
    save_tiny(folder / "tiny")
    convert(str(folder / "tiny"), folder / "source", ConvertOptions(measure=False, **settings))
    return folder / "source"


def test_two_schemes_do_not_go_into_a_container_of_one(tmp_path: Path) -> None:
    source = quantized(tmp_path, recipe="w4a16-rtn", overrides=("down_proj=w4a16-g32",))

    with pytest.raises(FormatError, match=r"awq cannot hold 2 of 14 layers .*awq holds one scheme a model, and most layers are w4a16-asym-g64"):
        convert(str(source), tmp_path / "out", options("awq"))


def test_layers_that_were_not_quantized_and_biases_stay_what_they_are(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", family="qwen2")
    convert(str(tmp_path / "tiny"), tmp_path / "source", ConvertOptions(recipe="w4a16-rtn", ignore=("o_proj",), measure=False))

    report = convert(str(tmp_path / "source"), tmp_path / "out", options("gptq"))

    before, after = decode_folder(tmp_path / "source").tensors, decode_folder(tmp_path / "out").tensors
    assert before.keys() == after.keys() and any(name.endswith("q_proj.bias") for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(report.left_alone.values()) == {"not quantized in the source"}
    assert "-:^model\\.layers\\.0\\.self_attn\\.o_proj$" in OpenedCheckpoint(tmp_path / "out").reader.quantization_config["dynamic"]
    assert verify(tmp_path / "out", against=str(tmp_path / "source"), options=VerifyOptions(num_tokens=0)).ok


KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_SCALES = {f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor([0.01 * (layer + 1)]) for layer in range(2) for part in "kv"}


def with_kv_scales(folder: Path) -> Path:
    source = quantized(folder, recipe="w4a16-rtn")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_config(source, quantization_config=config | {"kv_cache_scheme": KV_SCHEME})
    return edit_tensors(source, lambda tensors: tensors.update(KV_SCALES))


def test_scales_of_the_kv_cache_go_where_they_have_a_place(tmp_path: Path) -> None:
    report = convert(str(with_kv_scales(tmp_path)), tmp_path / "out", options("compressed-tensors"))

    opened = OpenedCheckpoint(tmp_path / "out")
    assert opened.reader.quantization_config["kv_cache_scheme"] == KV_SCHEME
    assert all(torch.equal(opened.get(name), value) for name, value in KV_SCALES.items())
    assert not report.notes


DAMAGED = {
    "a bit": (
        lambda tensors: tensors["model.layers.1.self_attn.k_scale"].view(torch.int32).add_(1), "unquantized tensors", "differs from the original",
    ),
    "a shape": (lambda tensors: tensors.update({"model.layers.0.self_attn.v_scale": torch.ones(2)}), "unquantized tensors", "v_scale is [2]"),
    "one layer's": (lambda tensors: tensors.pop("model.layers.1.self_attn.v_scale"), "original's tensors", "v_scale of the original is"),
    "all": (lambda tensors: [tensors.pop(name) for name in KV_SCALES], "original's tensors", "k_scale of the original is missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_scale_of_the_kv_cache_is_found_by_comparing_bits(damage: str, tmp_path: Path) -> None:
    edit, check, words = DAMAGED[damage]
    source, quick = str(with_kv_scales(tmp_path)), VerifyOptions(num_tokens=0)
    convert(source, tmp_path / "out", options("compressed-tensors"))
    whole = verify(tmp_path / "out", against=source, options=quick)
    edit_tensors(tmp_path / "out", edit)

    damaged = verify(tmp_path / "out", against=source, options=quick)

    assert whole.ok and any("the 4 scales of its KV cache too" in each.detail for each in whole.checks)
    assert words in next(each.detail for each in damaged.checks if each.name == check and not each.ok)


def test_scales_of_the_kv_cache_that_were_calibrated_anew_are_not_compared(tmp_path: Path, tokens: Path) -> None:
    source = with_kv_scales(tmp_path)
    rows = CalibrationOptions(source=str(tokens), num_samples=4)

    convert(str(source), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", requantize=True, kv_cache="fp8", calibration=rows, measure=False))

    assert not torch.equal(OpenedCheckpoint(tmp_path / "out").get(next(iter(KV_SCALES))), next(iter(KV_SCALES.values())))
    assert verify(tmp_path / "out", against=str(source), options=VerifyOptions(num_tokens=0)).ok


@pytest.mark.parametrize("container", ["gptq", "bf16"])
def test_and_are_said_to_be_left_out_where_they_have_none(container: str, tmp_path: Path) -> None:
    source = with_kv_scales(tmp_path)

    report = convert(str(source), tmp_path / "out", options(container))

    assert report.notes[0] == f"the scheme of the KV cache and its 4 scales are left out: {container} has no place for them"
    assert not any(name in OpenedCheckpoint(tmp_path / "out").reader for name in KV_SCALES)
    assert verify(tmp_path / "out", against=str(source), options=VerifyOptions(num_tokens=0)).ok


def test_static_scales_of_inputs_go_along(tmp_path: Path) -> None:
    source = quantized(tmp_path, recipe="w4a16-rtn", overrides=(".=fp8-tensor",))
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] |= {"strategy": "tensor", "dynamic": False}
    edit_config(source, quantization_config=config)
    modules = list(OpenedCheckpoint(source).schemes)
    given = {f"{module}.input_scale": torch.tensor([0.01 + 0.001 * i], dtype=torch.bfloat16) for i, module in enumerate(modules)}
    edit_tensors(source, lambda tensors: tensors.update(given))

    report = convert(str(source), tmp_path / "out", options("fp8"))

    opened = OpenedCheckpoint(tmp_path / "out")
    assert report.losslessness == "14 of 14 layers lossless" and opened.reader.quantization_config["activation_scheme"] == "static"
    assert all(torch.equal(opened.reader.get(name), value.float()) for name, value in given.items())


def test_a_stopped_move_goes_on_and_ends_with_the_same_bytes(peers: Path, tmp_path: Path) -> None:
    source, wanted = peers / "gptq_b4_g128", options("compressed-tensors", max_shard_size=200_000)
    stopped(source, tmp_path / "out", wanted, after=1)

    report = convert(str(source), tmp_path / "out", wanted)

    whole = convert(str(source), tmp_path / "whole", wanted)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and report.layers == whole.layers


def test_a_zero_point_that_loaders_read_in_two_ways_is_refused_before_work_or_quantized_anew(peers: Path, tmp_path: Path) -> None:
    """A stored 15 is a zero point of 16, or of 0, in version 1 of GPTQ."""
    source = shutil.copytree(peers / "gptq_b4_g128", tmp_path / "source", copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_config(source, quantization_config=config | {"sym": False})
    name = "model.layers.2.mlp.up_proj.qzeros"
    edit_tensors(source, lambda tensors: tensors[name].view(-1)[0:1].fill_(-1))

    told = "zero points of model.layers.2.mlp.up_proj are stored less one as all ones: read here as one beyond the highest code"
    assert any(note.startswith(told) for note in summarize(source).notes)
    again = {"recipe": "w4a16-rtn", "requantize": True}
    for settings in ({"format": "bf16"}, again, again | {"recipe": "w4a16-gptq", "target_bpw": 4.5}):
        assert any(note.startswith(told) for note in plan_conversion(str(source), ConvertOptions(**settings)).plan.notes), settings
    with pytest.raises(FormatError, match=r"1 of 28 layers.*layers.2.mlp.up_proj: it stores a zero point less one as all ones"):
        convert(str(source), tmp_path / "out", options("compressed-tensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    report = convert(str(source), tmp_path / "out", options("compressed-tensors", requantize=True))
    assert [layer.name for layer in report.layers if not layer.lossless] == ["model.layers.2.mlp.up_proj"]


@pytest.mark.parametrize("settings", [{"container": "compressed-tensors", "dtype": "bfloat16"}, {"container": "bf16"}], ids=["moved", "plain"])
def test_tensors_that_were_not_quantized_and_are_rounded_are_told_of(settings: dict[str, str], tmp_path: Path) -> None:
    source = quantized(tmp_path, recipe="w4a16-rtn")
    before = OpenedCheckpoint(source)
    assert {before.reader.info(name).dtype for name in before.dense_names} == {torch.float32}

    report = convert(str(source), tmp_path / "out", options(**settings))
    kept = convert(str(source), tmp_path / "kept", options("compressed-tensors"))

    rounded = [note for note in report.notes if "tensors that were not quantized are rounded, from float32 to bfloat16" in note]
    assert len(rounded) == 1 and rounded[0].startswith(f"{len(before.dense_names)} ")
    assert not any("rounded" in note for note in kept.notes)


def test_a_damaged_layer_is_named(tmp_path: Path) -> None:
    source = quantized(tmp_path, recipe="w4a16-rtn")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight_scale"].view(-1)[3:4].fill_(torch.nan))

    with pytest.raises(SourceError, match=r"layers.1.mlp.up_proj holds NaN or infinite values"):
        convert(str(source), tmp_path / "out", options("compressed-tensors"))


# Ordinary weights


@pytest.mark.parametrize("name", ["gptq_b4_g64_desc", "awq_gemm_autoawq", "ct_fp8_block", "ct_nvfp4a16", "ct_w8a8_gptq", "bnb_nf4_dq", "bnb_int8"])
def test_back_to_bfloat16_is_the_decoded_weight_rounded(name: str, peers: Path, tmp_path: Path) -> None:
    report = convert(str(peers / name), tmp_path / "out", options("bf16"))

    expected = decode_folder(peers / name).tensors
    model, config = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and model.dtype == torch.bfloat16
    state = model.state_dict()
    assert all(torch.equal(state[tensor], value.bfloat16()) for tensor, value in expected.items() if "SCB" not in name)
    assert [layer.name for layer in report.layers] and report.linear_bpw == 0
    for layer in report.layers:
        w = expected[f"{layer.name}.weight"]
        assert layer.max_error == pytest.approx(float((w - w.bfloat16().float()).abs().max()), rel=1e-3)
    assert report.losslessness.startswith("0 of 28 layers lossless, 28 rounded to bfloat16: off by up to")


def test_a_float32_model_becomes_bfloat16(tiny: Path, tmp_path: Path) -> None:
    report = convert(str(tiny), tmp_path / "out", options("bf16"))

    before, after = OpenedCheckpoint(tiny), OpenedCheckpoint(tmp_path / "out")
    assert all(torch.equal(after.get(name), before.get(name).bfloat16()) for name in before.names)
    assert not report.layers and report.losslessness is None and report.worst is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "w4a16-rtn"}, "ordinary weights, and a recipe"),
        ({"kv_cache": "fp8"}, "ordinary weights.* a KV cache"),
        ({"dtype": "float16"}, "writes bfloat16, and dtype is float16"),
    ],
)
def test_what_contradicts_ordinary_weights_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options("bf16", **settings)


def test_a_recipe_still_asks_for_requantize(peers: Path) -> None:
    with pytest.raises(SourceError, match="--format compressed-tensors, to move it there as it is"):
        plan_conversion(str(peers / "gptq_b4_g128"), options("awq", recipe="w4a16-asym-gptq"))
