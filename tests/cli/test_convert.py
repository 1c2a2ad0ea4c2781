"""`quantkit convert` as it is typed: what it prints where, what its options reach, how it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from quantkit.cli import progress
from quantkit.cli.main import main
from quantkit.conversion.report import LayerResult
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.formats.engines import ENGINES
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import FORMATS
from tests.conversion.conftest import edit_tensors, save_tiny

Captured = pytest.CaptureFixture[str]
DATA_FREE = ("-r", "w4a16-rtn")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def calibration(tmp_path: Path) -> tuple[str, ...]:
    """Options for a calibration of a second."""
    save_file({"input_ids": torch.randint(3, 96, (6, 64))}, tmp_path / "rows.safetensors")
    return ("--calib", str(tmp_path / "rows.safetensors"), "--num-samples", "4")


def convert(*arguments: str | Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments)])
    assert (ended.value.code or 0) == code


def test_results_on_stdout_and_progress_on_stderr(tiny: Path, tmp_path: Path, calibration: tuple[str, ...], capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", *calibration)

    shown = capsys.readouterr()
    for words in (
        "by w4a16-gptq as compressed-tensors",
        "bits per weight",
        "peak memory",
        "layer error",
        "perplexity",
        "KL divergence",
        "4 rows x 64 tokens",
    ):
        assert words in shown.out, words
    assert "left alone (outside the decoder blocks): lm_head" in shown.out
    assert "block 0" in shown.err and "block 1" in shown.err and "block" not in shown.out.replace("decoder blocks", "")
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.partial").exists()


def test_a_perplexity_beyond_all_numbers_is_a_result_too(tiny: Path, tmp_path: Path, calibration: tuple[str, ...], capsys: Captured) -> None:
    edit_tensors(tiny, lambda t: t["lm_head.weight"][5:].mul_(1e30))

    convert(tiny, "-o", tmp_path / "out", *calibration)

    words = "not finite -> not finite"
    assert words in capsys.readouterr().out and words in (tmp_path / "out" / "README.md").read_text()


def test_without_calibration_it_says_how_to_measure(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", *DATA_FREE)

    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"not measured; quantkit eval {tmp_path / 'out'} --baseline {tiny}" in words
    assert json.loads((tmp_path / "out" / "quantkit_report.json").read_text())["source"] == str(tiny)


def test_engines_that_do_not_load_the_output_are_told_with_the_reason(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "symmetric", *DATA_FREE)
    symmetric = capsys.readouterr().out
    convert(tiny, "-o", tmp_path / "asymmetric", *DATA_FREE, "--override", ".*=w4a16-asym-g32")
    asymmetric = capsys.readouterr().out

    assert "loads in vLLM, SGLang, transformers" in symmetric and "not in transformers" not in symmetric
    assert "not in transformers: fails on packed asymmetric weights by default" in asymmetric and "dequantize=True" in asymmetric


def test_files_that_do_not_come_along_are_named(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    save_file({"x": torch.ones(1)}, tiny / "extra.safetensors")
    (tiny / "recipe.yaml").write_text("theirs")
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n")
    (tiny / "spm.bin").write_bytes(b"\n\x0e\n\x05")

    convert(tiny, "-o", tmp_path / "out", *DATA_FREE)

    left = ["README.md", "extra.safetensors", "recipe.yaml"]
    assert f"by the output's own): {', '.join(left)}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "quantkit_report.json").read_text())["left_behind"] == left
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text() and (tmp_path / "out" / "spm.bin").is_file()
    checks = {check.name: check for check in verify(tmp_path / "out", against=str(tiny), options=VerifyOptions(num_tokens=0)).checks}
    assert checks["side files"].ok and checks["side files"].detail.endswith("other weights and pickles: extra.safetensors")


def test_a_suggested_command_can_be_typed_as_it_stands(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "my models" / "tiny")
    monkeypatch.chdir(tmp_path)

    convert("my models/tiny", "-o", "my models/out", *DATA_FREE)

    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "quantkit eval 'my models/out' --baseline 'my models/tiny'" in words


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_json_is_all_that_stdout_holds(is_calibrated: bool, tiny: Path, tmp_path: Path, calibration: tuple[str, ...], capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "--json", *(calibration if is_calibrated else DATA_FREE))

    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert len(report["layers"]) == 14 and (report["divergence"] is not None) == is_calibrated


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    before = sorted(tmp_path.rglob("*"))

    convert(tiny, "-o", tmp_path / "out", "--dry-run")
    convert(tiny, "-o", tmp_path / "out", "--dry-run", *DATA_FREE)

    shown = capsys.readouterr()
    assert "w4a16-g64" in shown.out and "bits per weight in quantized layers" in shown.out and shown.err == ""
    assert shown.out.index("calibrated") < shown.out.index("needs no calibration data")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry run", "run"])
def test_the_output_is_refused_before_the_source_is_looked_for(dry_run: list[str], tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()

    convert("nowhere/at/all", "-o", tmp_path / "out", *dry_run, code=1)

    assert "--overwrite" in capsys.readouterr().err


def test_a_dry_run_speaks_json(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    convert(tiny, "-o", tmp_path / "out", "--json", *DATA_FREE)
    report = json.loads(capsys.readouterr().out)

    assert plan["needs_calibration"] and plan["recipe"] == "w4a16-gptq"
    assert (plan["bytes_after"], plan["linear_bpw"]) == (report["bytes_after"], report["linear_bpw"])
    assert {name: layer["scheme"] for name, layer in plan["layers"].items()} == {layer["name"]: layer["scheme"] for layer in report["layers"]}


def test_options_reach_the_conversion(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    options = ["--override", "down_proj=w8a16", "--override", "up_proj=w3a16-g16", "--ignore", "v_proj", "--group-size", "32", "--dtype", "bfloat16"]

    convert(tiny, "-o", tmp_path / "out", *DATA_FREE, *options, "--max-shard-size", "30KB", "--device", "cpu")

    opened = OpenedCheckpoint(tmp_path / "out")
    schemes = {name.rpartition(".")[2]: scheme.name for name, scheme in opened.schemes.items()}
    assert schemes == {
        "q_proj": "w4a16-g32",
        "k_proj": "w4a16-g32",
        "o_proj": "w4a16-g32",
        "gate_proj": "w4a16-g32",
        "up_proj": "w3a16-g16",
        "down_proj": "w8a16-g32",
    }
    assert opened.dtype == torch.bfloat16 and len(opened.reader.files) > 2


@pytest.mark.parametrize("pattern", ["[qk]_proj", "q_proj[/]?", "[bold]?q_proj"])
def test_what_the_user_wrote_is_shown_as_written(pattern: str, tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", *DATA_FREE, "--ignore", pattern, "--dry-run")
    convert(tiny, "-o", tmp_path / "[red]out", *DATA_FREE, "--ignore", pattern)

    plan, report = capsys.readouterr().out.split("needs no calibration data")
    assert pattern in plan and pattern in report and "[red]out" in "".join(report.split())


def test_a_terminal_shows_the_words_of_a_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=200, markup=False))

    with progress.ConvertProgress() as bar:
        bar.started(1)
        bar.stage("reading [/]")
        bar.layer(LayerResult("model.[bold]x[/]", "w4a16", 1e-3, 1e-2))

    assert "model.[bold]x[/]" in screen.getvalue()


def test_overwrite_fresh_and_requantize_reach_it_too(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    convert(tiny, "-o", out, *DATA_FREE)
    convert(tiny, "-o", out, *DATA_FREE, code=1)
    assert "--overwrite" in capsys.readouterr().err
    convert(tiny, "-o", out, "-r", "w8a16", "--overwrite", "--fresh")
    convert(out, "-o", tmp_path / "again", *DATA_FREE, code=1)
    assert "--requantize" in capsys.readouterr().err
    convert(out, "-o", tmp_path / "again", *DATA_FREE, "--requantize")


def test_a_quantized_model_changes_its_container_and_says_that_nothing_is_lost(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "four", *DATA_FREE)
    capsys.readouterr()

    convert(tmp_path / "four", "-o", tmp_path / "out", "-f", "gptq", "--dry-run")
    plan = capsys.readouterr().out
    convert(tmp_path / "four", "-o", tmp_path / "out", "-f", "gptq")
    report = capsys.readouterr().out
    convert(tmp_path / "out", "-o", tmp_path / "plain", "-f", "bf16")
    decoded = capsys.readouterr().out

    assert "14 of 14 layers of compressed-tensors go over as they are" in plan and "would load in" in plan
    assert "14 of 14 layers lossless" in report and "KL" not in report
    assert "0 of 14 layers lossless, 14 rounded to bfloat16" in decoded and "bits per weight in quantized" not in decoded


def test_a_dry_run_tells_programs_which_engines_would_load_the_output(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "-r", "w3a16-gptq", "--dry-run", "--json")

    engines = {each["engine"]: each["loads"] for each in json.loads(capsys.readouterr().out)["engines"]}
    assert engines["vLLM"] is True and engines["SGLang"] is False


def test_a_dry_run_with_a_budget_tells_programs_what_is_not_known_yet(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "--target-bpw", "5", "--override", "o_proj=w8a16", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)

    assert [plan[name] for name in ("engines", "bytes_after", "linear_bpw", "file_bpw")] == [None] * 4 and plan["needs_calibration"]
    schemes = {name: layer["scheme"] for name, layer in plan["layers"].items()}
    assert {scheme for name, scheme in schemes.items() if "o_proj" in name} == {"w8a16-g64"}
    assert {scheme for name, scheme in schemes.items() if "o_proj" not in name} == {None}
    assert plan["layers"]["model.layers.0.mlp.up_proj"]["candidates"] == [f"w{bits}a16-g64" for bits in (2, 3, 4, 5, 6, 8)]
    sglang = {each["scheme"]: _loads(each["engines"], "SGLang") for each in plan["allocation"]["candidates"]}
    assert sglang == {"w2a16": False, "w3a16": False, "w4a16": True, "w5a16": False, "w6a16": False, "w8a16": True}
    mixture = plan["allocation"]["mixture"]["engines"]
    assert _loads(mixture, "vLLM") and not _loads(mixture, "SGLang") and not _loads(mixture, "llama.cpp")
    assert plan["allocation"]["budget"] == "target-bpw 5" and plan["allocation"]["range"][0] < 3 < 8 < plan["allocation"]["range"][1]


def _loads(engines: list[dict], name: str) -> bool:
    return next(each["loads"] for each in engines if each["engine"] == name)


def test_what_a_target_engine_would_not_load_is_refused_in_one_message(tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "-r", "w3a16-gptq", "--target-engine", "sglang", code=1)

    shown = capsys.readouterr()
    assert shown.err.startswith("Error: SGLang 0.5.23 would not load compressed-tensors with 14 layers of") and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_names_every_engine(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])

    assert ", ".join(engine.name for engine in ENGINES) in " ".join(capsys.readouterr().out.split())


def test_measuring_can_be_left_out(tiny: Path, tmp_path: Path, calibration: tuple[str, ...], capsys: Captured) -> None:
    convert(tiny, "-o", tmp_path / "out", "--json", "--no-measure", *calibration)

    assert json.loads(capsys.readouterr().out)["divergence"] is None


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("512MiB", 512 << 20), ("2kb", 2000), ("100000", 100_000), ("1GiB", 1 << 30)]
)
def test_sizes_are_read_with_their_units(size: str, num_bytes: int) -> None:
    from quantkit.cli.convert import Size

    assert Size().convert(size, None, None) == num_bytes


WRONG_USAGE = {
    "no source": (["-o", "out"], "Missing argument 'SOURCE'"),
    "no output": (["model"], "Missing option '-o' / '--out'"),
    "size": (["--max-shard-size", "5XB"], "'5XB' is no size; write 5GB, 500MB or 512MiB"),
    "no size": (["--max-shard-size", "large"], "'large' is no size"),
    "negative size": (["--max-shard-size=-5GB"], "'-5GB' is no size"),
    "size of nothing": (["--max-shard-size", "0"], "max_shard_size is 0; give a size such as 5GB"),
    "samples": (["--num-samples", "0"], "0 is not in the range x>=1"),
    "seq_len": (["--seq-len", "1"], "1 is not in the range x>=2"),
    "samples in words": (["--num-samples", "many"], "'many' is not a valid integer"),
    "layout": (["--calib-layout", "stack"], "'stack' is not one of 'pack', 'pad'"),
    "dtype": (["--dtype", "float17"], "unknown dtype 'float17'; did you mean 'float16'"),
    "device": (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
    "recipe": (["-r", "w4a16-gtpq"], "unknown recipe 'w4a16-gtpq'; did you mean 'w4a16-gptq'"),
    "format": (["-f", "gtpq"], "unknown format 'gtpq'; did you mean 'gptq'?"),
    "override": (["--override", "down_proj"], "override 'down_proj' is not of the form 'REGEX=scheme'"),
    "scheme": (["--override", "down_proj=w4a17"], "unknown scheme 'w4a17'; did you mean 'w4a16'"),
    "no group": (["--group-size", "0"], "group size 0 is not supported; use 8 or more, or -1"),
    "pattern": (["--ignore", "("], "pattern '(' is not a regular expression"),
    "half a pair": (["--prompt-column", "q"], "prompt_column and response_column come together"),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_ends_with_2(case: str, tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    arguments, message = WRONG_USAGE[case]
    arguments = arguments if case in ("no source", "no output") else [str(tiny), "-o", str(tmp_path / "out"), *arguments]

    convert(*arguments, code=2)

    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split()) and shown.out == "" and "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


REFUSED = {
    "source": (["nowhere/at/all"], "there is no folder 'nowhere/at/all'"),
    "pattern": (["TINY", "--ignore", "downproj"], "pattern 'downproj' matches no layer; layers end in down_proj"),
    "group": (["TINY", "--group-size", "48"], "group size 48 does not divide the 64 input features"),
    "tokenizer": (["TINY"], "has no tokenizer"),
    "data": (["TINY", "--calib", "nothing.txt"], "has no tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_message(case: str, tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    (source, *options), message = REFUSED[case]
    before = sorted(tmp_path.iterdir())

    convert(str(tiny) if source == "TINY" else source, "-o", tmp_path / "out", *options, code=1)

    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("Error: ") and message in shown.err and shown.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_allocation_is_planned_told_and_planned_again_for_another_budget(
    tiny: Path, tmp_path: Path, calibration: tuple[str, ...], capsys: Captured
) -> None:
    convert(tiny, "-o", tmp_path / "out", "--dry-run", "--target-bpw", "4.5")
    before = capsys.readouterr().out
    convert(tiny, "-o", tmp_path / "out", *calibration, "--target-bpw", "4.5")
    made = " ".join(capsys.readouterr().out.replace("│", " ").split())
    convert(tiny, "-o", tmp_path / "other", "--dry-run", "--max-kl", "1", "--allocation", tmp_path / "out")
    after = capsys.readouterr().out

    assert "a measurement is needed" in before and "the candidates reach from" in before and "side by side" in before
    assert "would be calibrated" in before
    assert "target-bpw 4.5; KL predicted" in made and ", measured" in made
    assert "a measurement is needed" not in after and "self_attn.qkv_proj" in after and "KL divergence predicted" in after
    assert not (tmp_path / "other").exists()


def test_help_names_every_container(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])

    assert ended.value.code == 0
    assert f"Container: {', '.join(FORMATS)}, bf16 (ordinary weights)." in " ".join(capsys.readouterr().out.split())
