"""Sound checkpoints pass, and every kind of damage fails the check that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from os import truncate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.cli import main
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.verification import Verification
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.core.data_free import quantize
from quantkit.core.packing import pack
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import SourceError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import FORMATS
from quantkit.formats.streamed import open_streamed
from quantkit.models.architecture import describe, load_config
from quantkit.models.compare import TokenRows, compare
from tests.conversion.conftest import edit_tensors, save_tiny
from tests.models.test_streaming import save_random

Q = "model.layers.1.self_attn.q_proj"
QUICK = VerifyOptions(num_tokens=0)


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if not check.ok}


@pytest.mark.parametrize("name", [
    "gptq_b4_g64_desc", "gptq_b3_g128", "ct_w8a8_gptq", "ct_fp8_block", "ct_fp8_dynamic", "ct_nvfp4a16", "bnb_nf4_dq", "bnb_int8",
    "hf_finegrained_fp8_handmade", "tiny",
])
def test_what_peers_wrote_passes_every_check(name: str, peers: Path) -> None:
    result = verify(peers / name, against=str(peers / "tiny"), options=QUICK)

    assert failed(result) == {}
    assert len(result.layer_errors) == (0 if name == "tiny" else 28)
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


def test_divergence_is_measured_on_the_built_in_text(peers: Path) -> None:
    result = verify(peers / "ct_w4a16_gptq", against=str(peers / "tiny"), options=VerifyOptions(num_tokens=512))

    assert failed(result) == {}
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 0.05


def test_without_the_original_less_is_checked_and_nothing_is_read_of_it(peers: Path) -> None:
    result = verify(peers / "gptq_b4_g128")

    assert result.ok
    assert {check.name for check in result.checks} & {"layer errors", "unquantized tensors", "KL divergence"} == set()


def test_folded_norms_are_told_apart_from_damage(peers: Path) -> None:
    result = verify(peers / "ct_w4a16_asym_awq", against=str(peers / "tiny"), options=QUICK)

    assert "only norms differ, as after AWQ" in failed(result)["unquantized tensors"]


def test_what_we_fold_ourselves_is_not_taken_for_damage(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nrules: [{pattern: .*, scheme: w4a16-asym-g32, rounding: rtn, transforms: [awq]}]")
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (8, 64), generator=torch.Generator().manual_seed(0))}, tokens)
    calibration = CalibrationOptions(source=str(tokens), num_samples=8)
    convert(str(source), tmp_path / "out", ConvertOptions(recipe=str(recipe), calibration=calibration, measure=False))

    result = verify(tmp_path / "out", against=str(source), options=QUICK)

    assert failed(result) == {}
    assert "not compared" in next(check.detail for check in result.checks if check.name == "layer errors")
    edit_tensors(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "model.norm.weight differs" in failed(verify(tmp_path / "out", against=str(source), options=QUICK))["unquantized tensors"]


def test_a_model_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        verify(tmp_path / "nothing")


Change = Callable[[dict[str, Tensor]], object]
WORDS, SCALES, NORM = f"{Q}.weight_packed", f"{Q}.weight_scale", "model.norm.weight"
CHANGES: dict[str, tuple[Change, str, str]] = {
    "part missing": (lambda t: t.pop(SCALES), "layer tensors", f"{SCALES} is missing"),
    "codes missing": (lambda t: t.pop(WORDS), "layer tensors", f"{WORDS} is missing"),
    "layer missing": (lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)], "architecture", f"no tensor for {Q}.weight"),
    "norm missing": (lambda t: t.pop(NORM), "architecture", "no tensor for model.norm.weight"),
    "original's tensor missing": (lambda t: t.pop(NORM), "original's tensors", "model.norm.weight of the original is missing"),
    "head of another size": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:99]}), "architecture", "lm_head.weight is [99, 256]"),
    "codes cut": (lambda t: t.update({WORDS: t[WORDS][:, :-1]}), "layer tensors", f"{WORDS} is int32 [256, 31]"),
    "scale NaN": (lambda t: t[SCALES][3].fill_(torch.nan), "scales", f"{Q} has 2 scales that are not finite"),
    "scale zero": (lambda t: t[SCALES][3].zero_(), "scales", f"{Q} has 2 of 512 scales that are zero"),
    "one row of scales wrong": (lambda t: t[SCALES][7].mul_(-3), "layer errors", f"{Q} has 1 rows that are not"),
    "codes of another layer": (lambda t: t[WORDS].random_(), "layer errors", f"{Q} is "),
    "one bit of a norm": (lambda t: t[NORM].view(torch.int16)[9].bitwise_xor_(1), "unquantized tensors", "model.norm.weight differs from"),
    "a tensor too many": (lambda t: t.update({"model.more": torch.ones(3)}), "extra tensors", "model.more is neither"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_altered_tensor_fails_the_check_that_names_it(kind: str, peers: Path, tmp_path: Path) -> None:
    change, check, message = CHANGES[kind]
    folder = shutil.copytree(peers / "ct_w4a16_gptq", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})

    result = verify(folder, against=str(peers / "tiny"), options=QUICK)

    assert message in failed(result).get(check, ""), failed(result)


def config_of(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def group_of(folder: Path, size: int) -> None:
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["group_size"] = size
    config_of(folder, config_groups=groups)


AS_V2 = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
FILES: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "truncated": ("ct_w4a16_gptq", lambda f: truncate(f / "model.safetensors", 5_000_000), "files", "truncated"),
    "no tokenizer": ("ct_w4a16_gptq", lambda f: [p.unlink() for p in f.glob("token*")], "tokenizer", "the original has one"),
    "broken tokenizer": ("ct_w4a16_gptq", lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer", "cannot be loaded"),
    "no chat template": ("ct_w4a16_gptq", lambda f: (f / "chat_template.jinja").unlink(), "side files", "chat_template.jinja of the original"),
    "head not ignored": ("ct_w4a16_gptq", lambda f: config_of(f, ignore=[]), "config", "lm_head is not quantized, and neither is it in ignore"),
    "unknown name ignored": ("ct_w4a16_gptq", lambda f: config_of(f, ignore=["lm_head", "model.layers.9.x"]), "config", "'model.layers.9.x'"),
    "quantized layer ignored": ("ct_w4a16_gptq", lambda f: config_of(f, ignore=["lm_head", Q]), "config", f"{Q} is quantized, and it is in ignore"),
    "two configs": ("gptq_b4_g128", lambda f: config_of(f, desc_act=True), "config", "quantize_config.json and config.json differ in desc_act"),
    "order not said": ("gptq_b4_g64_desc", lambda f: config_of(f, desc_act=False), "groups", "out of order, and the config says desc_act false"),
    "wrong bits": ("gptq_b4_g128", lambda f: config_of(f, bits=8), "decoding", "cannot be decoded"),
    "another group size": ("gptq_b4_g128", lambda f: config_of(f, group_size=64), "decoding", "the scales are [256, 2]; 256 x 256 codes in"),
    "a group size more": ("ct_w4a16_gptq", lambda f: group_of(f, 64), "layer tensors", "weight_scale is"),
    "a group size less": ("ct_w4a16_gptq", lambda f: group_of(f, 256), "layer tensors", "weight_scale is"),
    "zero points of v1 said to be v2": ("gptq_b4_g128", lambda f: config_of(f, **AS_V2), "decoding", "stores the zero point 8"),
    "one key says v2": ("gptq_b4_g128", lambda f: config_of(f, checkpoint_format="gptq_v2"), "files", "'gptq_v2' and format is 'gptq'"),
    "half a config": ("gptq_b4_g128", lambda f: config_of(f, bits=None), "files", "not understood"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_an_altered_file_fails_the_check_that_names_it(kind: str, peers: Path, tmp_path: Path) -> None:
    name, change, check, message = FILES[kind]
    folder = shutil.copytree(peers / name, tmp_path / "out")
    change(folder)

    result = verify(folder, against=str(peers / "tiny"), options=QUICK)

    assert message in failed(result).get(check, ""), failed(result)


@pytest.mark.parametrize("name", ["gptq_b3_g128", "gptq_b4_g128", "gptq_b8_g128"])
def test_zero_points_off_by_one_are_further_away_than_any_rounding(name: str, peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / name, tmp_path / "out")
    config_of(folder, **AS_V2, sym=False)

    result = verify(folder, against=str(peers / "tiny"), options=QUICK)

    assert "half of the layers are 1" in failed(result)["layer errors"]


def test_a_layer_left_out_is_told_at_three_bits_too(peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "gptq_b3_g128", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    middle = pack(torch.full((256, 256), 4, dtype=torch.uint8), 3).T.contiguous()
    save_file(tensors | {f"{Q}.qweight": middle}, folder / "model.safetensors", metadata={"format": "pt"})

    result = verify(folder, against=str(peers / "tiny"), options=QUICK)

    assert f"{Q} is 1 of its weight's power away" in failed(result)["layer errors"]


def test_a_single_layer_may_not_lie_far_beyond_its_rounding(peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "ct_w8a8_gptq", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_scale"] *= 1.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    result = verify(folder, against=str(peers / "tiny"), options=QUICK)

    assert f"{Q} is " in failed(result)["layer errors"] and "times as far from the original as rounding to 8 bits" in failed(result)["layer errors"]


def test_weights_of_zeros_and_of_few_values_are_as_near_as_can_be(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", tie_word_embeddings=True)
    edit_tensors(tmp_path / "m", lambda t: [t[name].sign_() for name in t if "mlp" in name])
    edit_tensors(tmp_path / "m", lambda t: [t[name].zero_() for name in t if "v_proj" in name])
    for recipe in ("w4a16-mse", "w8a16"):
        convert(str(tmp_path / "m"), tmp_path / recipe, ConvertOptions(recipe=recipe))

        assert failed(verify(tmp_path / recipe, against=str(tmp_path / "m"), options=QUICK)) == {}


def test_another_model_s_original_is_told_by_its_shapes(peers: Path, test_data: Path) -> None:
    result = verify(peers / "ct_w4a16_gptq", against=str(test_data / "data" / "stories260k-hf"), options=VerifyOptions(num_tokens=100))

    assert "down_proj is [256, 512], and [64, 172] in the original" in failed(result)["layer errors"]
    assert "they are not the same model" in failed(result)["KL divergence"]


def test_a_model_that_computes_nan_fails_with_the_block_named(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "data" / "stories260k-hf"
    folder = shutil.copytree(source, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"][5] = torch.nan
    save_file(tensors, folder / "model.safetensors")

    result = verify(folder, against=str(source), options=VerifyOptions(num_tokens=100))

    assert "the quantized model gives NaN from model.layers.3 on" in failed(result)["KL divergence"]


def test_the_command_prints_a_table_and_ends_with_the_verdict(peers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(peers / "ct_w4a16_gptq", tmp_path / "out")
    arguments = ["verify", str(folder), "--against", str(peers / "tiny"), "--no-kl"]
    with pytest.raises(SystemExit) as sound:
        main(arguments)
    printed = capsys.readouterr().out
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit) as damaged:
        main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)

    assert (sound.value.code, damaged.value.code) == (0, 1)
    assert "all 15 checks passed" in printed
    assert [check["name"] for check in report["checks"] if not check["ok"]] == ["side files"]


def test_square_conv1d_weights_are_turned_the_right_way(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "source")
    source, scheme, fmt = OpenedCheckpoint(tmp_path / "source"), parse_scheme("w8a16-g32"), FORMATS["gptq"]
    linears = [linear for block in describe(load_config(tmp_path / "source"), source).blocks for linear in block.linears]
    tensors = {name: source.get(name) for name in source.names if name.removesuffix(".weight") not in {linear.name for linear in linears}}
    for linear in linears:
        parts = fmt.encode(quantize(source.get(f"{linear.name}.weight").T, scheme.weight, torch.float16), scheme)
        tensors |= {f"{linear.name}.{part}": tensor for part, tensor in parts.items()}
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    settings["quantization_config"] = fmt.config({linear.name: scheme for linear in linears}, ignored=["lm_head"])
    (out / "config.json").write_text(json.dumps(settings))

    result = verify(out, against=str(tmp_path / "source"), options=QUICK)
    rows = TokenRows.of_texts(torch.randint(3, 64, (2, 16)))
    divergence = compare(open_streamed(tmp_path / "source", "base"), open_streamed(out, "quantized"), rows)

    assert "layer errors" not in failed(result), failed(result)
    assert max(result.layer_errors.values()) < 1e-3
    assert divergence.kl_mean < 1e-4


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_our_own_experts_pass_with_their_routers_left_alone(family: str, format_name: str, tmp_path: Path) -> None:
    save_random(family, tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", format=format_name, group_size=16))

    result = verify(tmp_path / "out", against=str(tmp_path / "m"), options=QUICK)

    assert failed(result) == {}


def test_an_unknown_part_of_a_quantized_layer_fails_without_an_original_too(peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "ct_w4a16_gptq", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{Q}.weight_odd": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})

    assert f"{Q}.weight_odd belongs to no w4a16 layer" in failed(verify(folder, options=QUICK))["files"]
