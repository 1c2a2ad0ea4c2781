"""What cannot be converted is refused in one sentence, before any work, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from quantkit.checkpoint.output import prepare, release
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.errors import CalibrationError, CheckpointError, FormatError, OutputError, QuantkitError, RecipeError, SourceError, UsageError
from tests.conversion.conftest import edit_config, edit_tensors, save_tiny

Options = Callable[..., ConvertOptions]
Refused = Callable[..., str]
DATA_FREE, CALIBRATED = "w4a16-rtn", "w4a16-gptq"


@pytest.fixture
def refused(tmp_path: Path, options: Options) -> Refused:
    """Convert and be refused: the message, after checking that nothing was left behind."""

    def refuse(model: Path, error: type[QuantkitError], *, out: Path | None = None, **settings: Any) -> str:
        out = out or tmp_path / "out"
        before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
        with pytest.raises(error) as caught:
            convert(str(model), out, options(**{"recipe": DATA_FREE} | settings))
        assert type(caught.value) is error
        assert before is None or sorted(out.parent.iterdir()) == before
        return str(caught.value)

    return refuse


# Sources


@pytest.mark.parametrize("recipe", [DATA_FREE, CALIBRATED])
def test_no_weights(recipe: str, tiny: Path, refused: Refused) -> None:
    (tiny / "model.safetensors").unlink()

    assert "holds no *.safetensors files; found config.json" in refused(tiny, SourceError, recipe=recipe)


@pytest.mark.parametrize("cut", [1, 1000, 10**6], ids=["one byte", "a tensor", "all"])
def test_truncated_weights(cut: int, tiny: Path, refused: Refused) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut])

    message = refused(tiny, CheckpointError)

    assert str(weights) in message and re.search("truncated|too short|empty", message)


def test_an_index_that_names_absent_shards(tmp_path: Path, refused: Refused) -> None:
    folder = save_tiny(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()

    message = refused(folder, CheckpointError)

    assert shard.name in message and "fetch the model again" in message


def test_pickles_are_refused_with_the_safe_way(tiny: Path, refused: Refused) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")

    message = refused(tiny, CheckpointError)

    assert "pickle can run any code" in message and "safe_serialization=True" in message


def test_an_unknown_architecture(tiny: Path, refused: Refused) -> None:
    edit_config(tiny, model_type="zorkformer", architectures=["ZorkForCausalLM"])

    message = refused(tiny, SourceError)

    assert "does not know this architecture" in message and "zorkformer" in message


def test_code_of_its_own_is_not_run_unasked(tiny: Path, refused: Refused) -> None:
    edit_config(tiny, model_type="zorkformer", auto_map={"AutoConfig": "zork.ZorkConfig", "AutoModelForCausalLM": "zork.Zork"})
    (tiny / "zork.py").write_text("raise SystemExit('ran')\n")

    assert "--trust-remote-code" in refused(tiny, SourceError)


def test_an_encoder(tmp_path: Path, refused: Refused) -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")

    message = refused(tmp_path / "bert", SourceError)

    assert "BertForMaskedLM" in message and "decoder-only" in message


def test_an_encoder_and_decoder(tmp_path: Path, refused: Refused) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).save_pretrained(tmp_path / "t5")

    message = refused(tmp_path / "t5", SourceError)

    assert "t5 is an encoder-decoder" in message and "decoder-only" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null"], ids=["empty", "cut", "list", "null"])
def test_a_damaged_config(text: str, tiny: Path, refused: Refused) -> None:
    (tiny / "config.json").write_text(text)

    assert str(tiny / "config.json") in refused(tiny, SourceError)


def test_a_config_that_promises_more_layers_than_there_are(tiny: Path, refused: Refused) -> None:
    edit_config(tiny, num_hidden_layers=3)

    message = refused(tiny, SourceError)

    assert "lacks 9 tensors its config promises: model.layers.2." in message


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_single_absent_tensor(name: str, tiny: Path, refused: Refused) -> None:
    edit_tensors(tiny, lambda tensors: tensors.pop(name))

    assert f"lacks 1 tensors its config promises: {name}" in refused(tiny, SourceError)


def test_weights_of_another_shape_than_the_config_says(tiny: Path, refused: Refused) -> None:
    edit_config(tiny, intermediate_size=256)

    assert "mlp.gate_proj.weight is [128, 64] where config.json asks for [256, 64]" in refused(tiny, SourceError)


@pytest.mark.parametrize("recipe", [DATA_FREE, CALIBRATED])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"], ids=["quantized", "carried"])
def test_weights_that_are_not_numbers(name: str, value: float, recipe: str, tiny: Path, tmp_path: Path, options: Options) -> None:
    edit_tensors(tiny, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))

    with pytest.raises(SourceError, match=f"{name} holds .*NaN or infinite.*damaged"):
        convert(str(tiny), tmp_path / "out", options(recipe))

    assert not (tmp_path / "out").exists()


def test_a_dtype_that_cannot_hold_a_carried_tensor(tiny: Path, tmp_path: Path, options: Options) -> None:
    edit_tensors(tiny, lambda tensors: tensors["model.norm.weight"][3:4].fill_(1e6))

    with pytest.raises(SourceError, match=r"model.norm.weight holds values up to 1e\+06, which float16 cannot; use --dtype bfloat16"):
        convert(str(tiny), tmp_path / "out", options(DATA_FREE, dtype="float16"))


def test_a_quantized_source_says_what_it_is_and_how_to_go_on(tiny: Path, tmp_path: Path, options: Options, refused: Refused) -> None:
    convert(str(tiny), tmp_path / "four", options(DATA_FREE))

    message = refused(tmp_path / "four", SourceError)

    assert "already quantized: compressed-tensors, 14 layers of w4a16" in message
    assert "--format compressed-tensors" in message and "--requantize" in message


def test_a_quantized_source_of_an_unread_kind(tiny: Path, refused: Refused) -> None:
    edit_config(tiny, quantization_config={"quant_method": "quark", "bits": 4})

    assert "'quark' is not read yet" in refused(tiny, FormatError)


# What is asked


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"recipe": "w4a16-gtpq"}, UsageError, "unknown recipe 'w4a16-gtpq'; did you mean 'w4a16-gptq'"),
        ({"recipe": "mine.yaml"}, UsageError, "no recipe file mine.yaml"),
        ({"overrides": ("down_proj",)}, UsageError, "'down_proj' is not of the form 'REGEX=scheme'; an example is 'down_proj=w8a16'"),
        ({"overrides": ("=w8a16",)}, UsageError, "not of the form 'REGEX=scheme'"),
        ({"overrides": ("down_proj=w4a17",)}, UsageError, "unknown scheme 'w4a17'; did you mean 'w4a16'"),
        ({"overrides": ("down_proj=w7a16",)}, UsageError, "7 bits are not supported; use one of 2, 3, 4, 5, 6, 8"),
        ({"overrides": ("(=w8a16",)}, UsageError, r"pattern '\(' is not a regular expression"),
        ({"overrides": ("downproj=w8a16",)}, RecipeError, "'downproj' matches no layer; layers end in down_proj, gate_proj, k_proj"),
        ({"overrides": ("lm_head=w8a16",)}, RecipeError, "'lm_head' matches only lm_head, which stays as it is"),
        ({"ignore": ("nothing_like_it",)}, RecipeError, "'nothing_like_it' matches no layer"),
        ({"ignore": ("*",)}, UsageError, r"pattern '\*' is not a regular expression"),
        ({"ignore": (".*",)}, RecipeError, "leaves nothing to quantize.*and 13 more: ignored by"),
        ({"group_size": 48}, RecipeError, "48 does not divide the 64 input features of .*q_proj and 13 more; use 64 or 32 or 16 or -1"),
        ({"group_size": 128}, RecipeError, "128 does not divide the 64 input features"),
        ({"group_size": 0}, UsageError, "group size 0 is not supported; use 8 or more, or -1"),
        ({"overrides": ("o_proj=w4a16-g48",)}, RecipeError, "48 does not divide the 64 input features of model.layers.0.self_attn.o_proj and 1 more"),
        ({"recipe": "w8a8-int8", "format": "gptq"}, FormatError, "gptq cannot hold w8a8-int8 of .* and 13 more.*use compressed-tensors"),
        ({"kv_cache": "fp8", "format": "gptq"}, FormatError, "gptq has no place for the scales of a KV cache; use compressed-tensors"),
        ({"overrides": ("down_proj=w5a16",), "format": "gptq"}, FormatError, "read 2, 3, 4, 8 bits, not 5; use compressed-tensors"),
        ({"device": "cuda:99"}, UsageError, "device 'cuda:99' cannot be used here .*; use auto or cpu"),
        ({"device": "gpu"}, UsageError, "device 'gpu' cannot be used here"),
        ({"device": "meta"}, UsageError, "device 'meta' cannot be used here"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_options_that_cannot_be_meant(settings: dict, error: type[QuantkitError], message: str, tiny: Path, refused: Refused) -> None:
    said = refused(tiny, error, **settings)

    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float17"}, "unknown dtype 'float17'; did you mean 'float16'"),
        ({"format": "gtpq"}, "unknown format 'gtpq'; did you mean 'gptq'"),
        ({"kv_cache": "fp9"}, "unknown KV cache 'fp9'; did you mean 'fp8'"),
        ({"max_shard_size": 0}, "max_shard_size is 0; give a size such as 5GB"),
    ],
    ids=str,
)
def test_options_that_cannot_exist(settings: dict, message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        ConvertOptions(**settings)


def test_the_head_may_be_ignored_by_name_though_it_is_left_alone_anyway(tiny: Path, tmp_path: Path, options: Options) -> None:
    convert(str(tiny), tmp_path / "out", options(DATA_FREE, ignore=("lm_head",)))


# Calibration data


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"seq_len": 64}, "seq_len"), ({"seed": 3, "text_column": "a"}, "text_column, seed"), ({"layout": "pad"}, "layout")],
    ids=str,
)
def test_options_of_text_for_rows_that_are_tokens_already(settings: dict, named: str) -> None:
    with pytest.raises(UsageError, match=f"rows of tokens, which are taken as they are, first to last; leave out {named}$"):
        CalibrationOptions(source="rows.safetensors", **settings)


def test_calibration_needs_a_tokenizer(tiny: Path, refused: Refused) -> None:
    message = refused(tiny, SourceError, recipe=CALIBRATED, source=None)

    assert "has no tokenizer (tokenizer.json" in message


def test_a_tokenizer_of_another_model(copied: Path, tmp_path: Path, refused: Refused) -> None:
    edit_config(copied, vocab_size=100)
    edit_tensors(copied, lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:100].clone()}))

    message = refused(copied, SourceError, recipe=CALIBRATED, source=None, seq_len=64)

    assert "the model's vocabulary has 100" in message and "own tokenizer" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n \n", "holds no calibration text"),
        ("short.txt", b"Once upon a time.", "is too short: .* do not fill one row of 64"),
        ("latin.txt", "Motörhead ".encode("latin-1") * 400, "UTF-8"),
        ("image.png", bytes(range(256)), "image.png"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": ', "broken.jsonl"),
    ],
    ids=["empty", "blank", "short", "latin-1", "unknown kind", "cut JSON"],
)
def test_calibration_data_that_cannot_be_used(name: str, content: bytes, message: str, stories: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / name).write_bytes(content)

    said = refused(stories, CalibrationError, recipe=CALIBRATED, source=str(tmp_path / name), seq_len=64)

    assert re.search(message, said), said


def test_calibration_data_that_is_not_there(stories: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no calibration file or folder" in refused(stories, CalibrationError, recipe=CALIBRATED, source=str(tmp_path / "none.txt"))


def test_longer_rows_than_the_model_takes(stories: Path, refused: Refused) -> None:
    message = refused(stories, CalibrationError, recipe=CALIBRATED, source=None, seq_len=513)

    assert "513 is beyond the model's context of 512" in message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.full((5, 64), 96)}, "outside the model's vocabulary of 96; it was made with another tokenizer"),
        ({"input_ids": torch.full((5, 64), -1)}, "outside the model's vocabulary"),
        ({"input_ids": torch.zeros(5, 129, dtype=torch.int64)}, "rows of 129 tokens; the model takes 2 to 128"),
        ({"input_ids": torch.zeros(5, 1, dtype=torch.int64)}, "rows of 1 tokens"),
        ({"input_ids": torch.zeros(0, 64, dtype=torch.int64)}, "outside the model's vocabulary|no rows"),
        ({"input_ids": torch.zeros(5, 64)}, "no integer tensor input_ids"),
        ({"input_ids": torch.zeros(64, dtype=torch.int64)}, "no integer tensor input_ids"),
        ({"ids": torch.zeros(5, 64, dtype=torch.int64)}, "it holds ids"),
    ],
    ids=["too large", "negative", "too long", "too short", "none", "floats", "flat", "other name"],
)
def test_token_files_that_do_not_fit_the_model(tensors: dict, message: str, tiny: Path, tmp_path: Path, refused: Refused) -> None:
    save_file(tensors, tmp_path / "rows.safetensors")

    said = refused(tiny, CalibrationError, recipe=CALIBRATED, source=str(tmp_path / "rows.safetensors"))

    assert re.search(message, said), said


@pytest.mark.parametrize("content", [None, b"", b"no tensors"], ids=["absent", "empty", "text"])
def test_token_files_that_are_none(content: bytes | None, tiny: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "rows.safetensors"
    if content is not None:
        path.write_bytes(content)

    assert str(path) in refused(tiny, CalibrationError, recipe=CALIBRATED, source=str(path))


# Places


def test_an_output_that_exists(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(tiny, tmp_path / "out")

    for recipe in (DATA_FREE, CALIBRATED):
        assert "exists; choose another name, or replace it with --overwrite" in refused(tiny, OutputError, recipe=recipe)


def test_an_output_that_exists_is_seen_before_calibration_data_is_read(stories: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(stories, tmp_path / "out", copy_function=shutil.copyfile)

    assert "--overwrite" in refused(stories, OutputError, recipe=CALIBRATED, source=str(tmp_path / "nothing.txt"))


def test_overwrite_spares_what_is_no_model(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")

    assert "is not a model (it holds thesis.tex)" in refused(tiny, OutputError, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_the_output(overwrite: bool, tiny: Path, refused: Refused) -> None:
    assert "is the source model" in refused(tiny, OutputError, out=tiny, overwrite=overwrite)
    assert "holds the source model" in refused(tiny, OutputError, out=tiny.parent, overwrite=overwrite)


def test_an_output_below_a_file(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")

    assert "cannot write" in refused(tiny, OutputError, out=tmp_path / "file" / "out")
    assert "is a file; the output is a folder" in refused(tiny, OutputError, out=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_an_output_where_one_may_not_write(tiny: Path, tmp_path: Path, options: Options) -> None:
    place = tmp_path / "read-only"
    place.mkdir(mode=0o555)
    open_to_all(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match="Permission denied; you may not write there; choose another place"):
            convert(str(tiny), place / "out", options(DATA_FREE))
    finally:
        os.seteuid(0)
    assert list(place.iterdir()) == []


def open_to_all(folder: Path) -> None:
    """Let everybody read a test's files and go through the folders above them."""
    for path in (*folder.rglob("*"), folder, *folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o055)


@pytest.mark.parametrize("recipe", [DATA_FREE, CALIBRATED])
def test_too_little_disk(recipe: str, tiny: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))

    message = refused(tiny, OutputError, recipe=recipe)

    assert re.search(r"needs 0\.\d+ MB and its disk has 0\.00 MB free; free some space or choose another place", message), message


def test_another_run_at_the_same_place(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    partial = prepare(tmp_path / "out")
    try:
        assert "another run is writing" in refused(tiny, OutputError)
    finally:
        release(partial)


def test_files_of_others_where_the_work_would_be_done(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")

    assert "files that quantkit did not write" in refused(tiny, OutputError)


def test_a_side_file_that_leads_out_of_the_model(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "secret").write_text("password")
    (tiny / "notes.txt").symlink_to(tmp_path / "secret")

    assert "leads out of the model" in refused(tiny, SourceError)
