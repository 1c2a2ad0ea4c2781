"""What is said of checkpoints that other tools really wrote, of unquantized and of damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

import quantkit
from quantkit.checkpoint.source import resolve
from quantkit.cli import main
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.summary import Summary, summarize

PARAMETERS, QUANTIZED = 4_458_752, 2_359_296
WRITTEN = {
    "gptq_b4_g128": ("gptq", "w4a16"), "gptq_b4_g64_desc": ("gptq", "w4a16-g64"), "gptq_b3_g128": ("gptq", "w3a16"),
    "gptq_b8_g128": ("gptq", "w8a16"),
    "ct_w4a16_gptq": ("compressed-tensors", "w4a16"), "ct_w4a16_asym_awq": ("compressed-tensors", "w4a16-asym"),
    "ct_w8a8_gptq": ("compressed-tensors", "w8a8-int8"), "awq_gemm_autoawq": ("awq", "w4a16-asym"), "bnb_int8": ("bitsandbytes", "int8"),
    "bnb_nf4_dq": ("bitsandbytes", "nf4-dq"), "ct_fp8_block": ("compressed-tensors", "fp8-block"),
    "hf_finegrained_fp8_handmade": ("fp8", "fp8-block"),
    "ct_nvfp4a16": ("compressed-tensors", "nvfp4"),
}  # fmt: skip


def loads(summary: Summary) -> dict[str, bool | None]:
    return {verdict.engine: verdict.loads for verdict in summary.verdicts}


@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_and_bits_are_those_of_the_file(name: str, peers: Path) -> None:
    container, scheme = WRITTEN[name]
    linear_bytes, others = 0, 0
    with safe_open(peers / name / "model.safetensors", framework="pt") as file:
        for key in (key for key in file.keys() if "_proj." in key):  # noqa: SIM118
            told = ("weight_shape", "quant_map", "quant_state", "weight_format")
            linear_bytes += 0 if any(word in key for word in told) else file.get_tensor(key).nbytes
        others = sum("_proj." not in key for key in file.keys())  # noqa: SIM118

    summary = summarize(peers / name)

    assert (summary.container, summary.parameters, len(summary.layers), len(summary.unquantized)) == (container, PARAMETERS, 28, others)
    assert {layer.scheme for layer in summary.layers} == {scheme}
    assert loads(summary)["quantkit"] is True and summary.notes == ()
    assert sum(layer.num_weights for layer in summary.layers) == QUANTIZED
    assert summary.linear_bpw == pytest.approx(8 * linear_bytes / QUANTIZED)
    assert summary.file_bpw == pytest.approx(8 * (peers / name / "model.safetensors").stat().st_size / PARAMETERS)
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False))["linear_bpw"] == summary.linear_bpw


def test_a_container_that_is_not_decoded_says_so_and_who_loads_it(peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "awq_gemm_autoawq", tmp_path / "out")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"gemm"', '"gemv"'))

    summary = summarize(folder)

    assert "AWQ of version 'gemv' with 4 bits is not read" in summary.notes[0]
    assert "group_size=128" in summary.notes[1]
    assert (loads(summary)["vLLM"], loads(summary)["llama.cpp"], loads(summary)["quantkit"]) == (True, False, False)


@pytest.mark.parametrize(("name", "size"), [("gptq_b4_g128", 64), ("ct_w4a16_gptq", 64), ("ct_w4a16_gptq", 256)])
def test_a_config_that_contradicts_the_scales_is_said_and_not_read(name: str, size: int, peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / name, tmp_path / "out")
    for file in ("config.json", "quantize_config.json"):
        if (folder / file).exists():
            (folder / file).write_text((folder / file).read_text().replace('"group_size": 128', f'"group_size": {size}'))

    summary = summarize(folder)

    assert loads(summary)["quantkit"] is False and f"w4a16{'-g64' if size == 64 else '-g256'} wants" in summary.notes[0]
    with pytest.raises(FormatError, match=r"^model.layers.0.mlp.up_proj cannot be decoded: the scales are \[512, 2\]"):
        OpenedCheckpoint(folder).quantized("model.layers.0.mlp.up_proj")


def test_an_unquantized_tied_model(test_data: Path) -> None:
    summary = summarize(test_data / "data" / "stories3m-hf")

    assert (summary.container, summary.layers, summary.linear_bpw, summary.is_tied) == (None, (), None, True)
    assert summary.file_bpw == pytest.approx(32, abs=0.1)
    assert all(loads(summary).values())


def test_act_order_of_others_is_not_for_vllm(peers: Path) -> None:
    assert loads(summarize(peers / "gptq_b4_g64_desc"))["vLLM"] is False


def test_a_gguf_file_or_folder_is_named(peers: Path) -> None:
    file = next((peers / "gguf").glob("*q4_k_m.gguf"))

    assert "version 3, 39 tensors" in summarize(file).notes[1]
    assert summarize(peers / "gguf").container == "gguf"
    assert summarize(file).file_bytes == file.stat().st_size


SENSELESS = [
    {"quant_method": "never-heard-of"}, {"quant_method": "gptq"}, {"quant_method": "compressed-tensors", "config_groups": 3}, {"bits": 4},
    {"quant_method": "gptq", "bits": 7, "group_size": 128},
]  # fmt: skip


@pytest.mark.parametrize("config", SENSELESS)
def test_a_configuration_that_makes_no_sense_is_reported_and_no_crash(config: dict, peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "gptq_b4_g128", tmp_path / "model")
    (folder / "quantize_config.json").unlink()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))

    summary = summarize(folder)

    assert summary.notes
    assert summary.parameters == PARAMETERS
    assert loads(summary)["quantkit"] is False


def test_a_damaged_file_is_a_clear_error(peers: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peers / "ct_w4a16_gptq", tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        summarize(folder)


def test_the_command_prints_the_same_in_words_and_in_json(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for arguments in ((), ("--layers",), ("--json",)):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(peers / "gptq_b4_g128"), *arguments])
        assert ended.value.code == 0
        printed[arguments] = capsys.readouterr().out

    assert "4.267 bits per weight in 28 quantized layers" in printed[()]
    assert "model.layers.3.mlp.up_proj" in printed[("--layers",)]
    assert json.loads(printed[("--json",)]) == quantkit.inspect(str(peers / "gptq_b4_g128")).to_dict()


def test_the_reference_model_is_known_by_its_name() -> None:
    summary = quantkit.inspect("reference")

    assert summary.container is None and summary.path == str(resolve("reference").folder)
