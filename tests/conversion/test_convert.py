"""Whole conversions of small models: every recipe in every container, and what a user finds in the folder afterwards."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.convert import Silent, convert, run
from quantkit.conversion.layer_plan import holds
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.recipe import Recipe, list_recipes
from quantkit.conversion.report import LayerResult
from quantkit.conversion.token_file import load_token_file
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import UsageError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import FORMATS
from quantkit.models.activations import fake_quantize_inputs
from tests.conversion.conftest import contents, edit_tensors, save_tiny
from tests.models.test_streaming import save_random

Options = Callable[..., ConvertOptions]
needs_compressed_tensors = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the package compressed-tensors is not installed")


def decoded(folder: Path) -> torch.nn.Module:
    """The model of a checkpoint's decoded weights, in float32."""
    opened = OpenedCheckpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: opened.get(name).float() for name in opened.names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def logits(model: torch.nn.Module, vocabulary: int = 96) -> Tensor:
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def is_held(recipe: Recipe, format_name: str) -> bool:
    """Whether a container takes what the recipe asks for, and the test's model has a layer for it: 128 divides none of its dimensions."""
    fmt, schemes = FORMATS[format_name], {rule.scheme for rule in recipe.rules}
    takes_all = all(holds(fmt, parse_scheme(scheme)) for scheme in schemes)
    is_one = len(schemes) == 1 and recipe.allocate is None
    return takes_all and (fmt.holds_mixed or is_one) and (format_name, recipe.name) != ("fp8", "fp8-block")


LARGEST_ERROR = {
    ("int", 2): 0.6, ("int", 3): 0.3, ("int", 4): 0.15, ("int", 5): 0.15, ("int", 6): 0.15, ("int", 8): 0.02,
    ("e4m3", 8): 0.06, ("e2m1", 4): 0.3, ("nf4", 4): 0.3, ("fp4", 4): 0.3,
}  # fmt: skip
"""Of logits, relative to their spread, by the coarsest grid of a model."""
HELD = [(recipe.name, name) for recipe in list_recipes() for name in FORMATS if is_held(recipe, name)]


@pytest.mark.parametrize(("recipe", "format_name"), HELD)
def test_every_recipe_fills_every_container_that_holds_it(recipe: str, format_name: str, stories: Path, tmp_path: Path, options: Options) -> None:
    allocates = Recipe.load(recipe).allocate is not None
    wanted = options(recipe, format=format_name, target_bpw=6.0 if allocates else None)
    plan = plan_conversion(str(stories), wanted).plan

    report = convert(str(stories), tmp_path / "out", wanted)

    opened = OpenedCheckpoint(tmp_path / "out")
    assert {name: scheme.name for name, scheme in opened.schemes.items()} == {layer.name: layer.scheme for layer in report.layers}
    assert {layer.name for layer in report.layers} == set(plan.layers)
    assert allocates or all(layer.scheme == plan.layers[layer.name].scheme.name for layer in report.layers)
    limit = max(LARGEST_ERROR[layer.scheme.weight.kind, layer.scheme.weight.bits] for layer in plan.layers.values())
    original, ours = logits(decoded(stories)), logits(decoded(tmp_path / "out"))
    assert (ours - original).std() / original.std() < limit
    assert (report.divergence is not None) == plan.needs_calibration


@needs_compressed_tensors
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["w2a16-gptq", "w3a16-gptq", "w4a16-rtn", "w4a16-mixed-gptq", "w8a16"])
def test_transformers_loads_what_we_write_and_computes_what_we_decode(recipe: str, stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "out", options(recipe))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    torch.testing.assert_close(logits(model), logits(decoded(tmp_path / "out")), atol=1e-4, rtol=1e-4)


@needs_compressed_tensors
@pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="older transformers round zero points otherwise")
@pytest.mark.filterwarnings("ignore")
def test_transformers_decodes_zero_points_as_we_do(tiny: Path, tmp_path: Path, options: Options) -> None:
    from transformers import CompressedTensorsConfig

    convert(str(tiny), tmp_path / "out", options("w4a16-asym-gptq", group_size=32))

    # transformers 5.23 expects unpacked zero points unless it decodes at load, and then takes one scheme for all layers
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=config).eval()

    opened, state = OpenedCheckpoint(tmp_path / "out"), model.state_dict()
    assert len(opened.schemes) == 14
    for name in opened.schemes:
        assert torch.equal(state[f"{name}.weight"], opened.get(f"{name}.weight").half().float()), name  # it decodes in the scales' type


@needs_compressed_tensors
@pytest.mark.filterwarnings("ignore")
def test_transformers_quantizes_activations_as_we_do(stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "out", options("w8a8-int8"))
    ours = decoded(tmp_path / "out")
    schemes = OpenedCheckpoint(tmp_path / "out").schemes

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    with fake_quantize_inputs({name: ours.get_submodule(name) for name in schemes}, schemes):
        expected = logits(ours)
    difference = (logits(theirs) - expected).abs().max() / expected.std()
    assert difference < 0.02  # a rounding that falls the other way at one token moves its logits by one step of 8 bits


def test_the_report_measures_what_transformers_would(stories: Path, tmp_path: Path, options: Options, tokens: Path) -> None:
    report = convert(str(stories), tmp_path / "out", options())

    held_out = load_file(tokens)["input_ids"][4:5]
    losses = []
    for model in (decoded(stories), decoded(tmp_path / "out")):
        with torch.no_grad():
            losses.append(float(model(held_out, labels=held_out).loss))
    assert report.divergence["num_tokens"] == 63
    assert report.divergence["ppl_baseline"] == pytest.approx(math.exp(losses[0]), rel=1e-3)
    assert report.divergence["ppl_quantized"] == pytest.approx(math.exp(losses[1]), rel=1e-3)
    assert report.divergence["kl_mean"] > 0


# What lies in the folder


def test_side_files_come_along_and_a_card_is_written(copied: Path, tmp_path: Path, options: Options) -> None:
    (copied / "README.md").write_text("# The original's card")
    (copied / "assets").mkdir()
    (copied / "assets" / "logo.svg").write_text("<svg/>")
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    (copied / "pytorch_model.bin").write_bytes(b"a pickle beside the safetensors")

    report = convert(str(copied), tmp_path / "out", options())

    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "assets/logo.svg", "chat_template.jinja"):
        assert (out / name).read_bytes() == (copied / name).read_bytes(), name
    assert not (out / "pytorch_model.bin").exists() and not (out / "ledger.json").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    card = (out / "README.md").read_text()
    assert "original's card" not in card and "w4a16-gptq" in card and f"{report.linear_bpw:.3f}" in card
    stored = json.loads((out / "quantkit_report.json").read_text())
    assert stored["layers"][0]["name"] == report.layers[0].name and stored["mean_error"] == report.mean_error
    assert (out / "recipe.yaml").read_text().startswith("name: w4a16-gptq")


def test_a_written_recipe_converts_to_the_same_bytes(stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "first", options("w4a16-rtn", overrides=("up_proj=w8a16",), ignore=("q_proj",)))

    convert(str(stories), tmp_path / "second", options(str(tmp_path / "first" / "recipe.yaml")))

    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-mse"])
def test_the_same_conversion_twice_gives_the_same_bytes(recipe: str, stories: Path, tmp_path: Path, options: Options) -> None:
    for name in ("first", "second"):
        convert(str(stories), tmp_path / name, options(recipe))

    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_tied_embeddings_stay_tied(stories: Path, tiny: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "tied", options("w4a16-rtn"))
    convert(str(tiny), tmp_path / "untied", options("w4a16-rtn"))

    assert "lm_head.weight" not in OpenedCheckpoint(tmp_path / "tied").reader
    assert AutoConfig.from_pretrained(tmp_path / "tied").tie_word_embeddings
    assert "lm_head.weight" in OpenedCheckpoint(tmp_path / "untied").reader


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_config_says_the_type_as_the_original_does(dtype: str, key: str, tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "m", dtype=getattr(torch, dtype), num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    stored = config.pop("dtype", None) or config.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(config | {key: stored}))

    convert(str(source), tmp_path / "kept", options("w4a16-rtn"))
    convert(str(source), tmp_path / "cast", options("w4a16-rtn", dtype="bfloat16"))

    kept, cast = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "cast"))
    assert kept[key] == dtype and cast[key] == "bfloat16"
    assert OpenedCheckpoint(tmp_path / "cast").dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "cast").dtype == torch.bfloat16


def test_the_config_keeps_every_other_key(copied: Path, tmp_path: Path, options: Options) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"note": "ünïcode", "nested": {"a": [1, None]}}))

    convert(str(copied), tmp_path / "out", options("w4a16-rtn"))

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == config | {"note": "ünïcode", "nested": {"a": [1, None]}}


def test_gptq_writes_the_config_where_old_loaders_look(stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "out", options("w4a16-rtn", format="gptq"))

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == (4, 64, True, "gptq")


def test_sharded_sources_convert_to_shards_and_back_to_one_file(tmp_path: Path, options: Options) -> None:
    whole = save_tiny(tmp_path / "whole")
    sharded = save_tiny(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3

    convert(str(sharded), tmp_path / "one", options())
    convert(str(whole), tmp_path / "many", options(max_shard_size=20_000))
    convert(str(whole), tmp_path / "other", options())

    one, many, other = (OpenedCheckpoint(tmp_path / name).reader for name in ("one", "many", "other"))
    assert len(one.files) == 1 and len(many.files) > 3 and (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert all(file.stat().st_size < 60_000 for file in many.files)
    for name in one.names:
        assert torch.equal(one.get(name), many.get(name)) and torch.equal(one.get(name), other.get(name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_are_calibrated_in_full(dtype: torch.dtype, tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "m", dtype=dtype)

    report = convert(str(source), tmp_path / "out", options())

    original, ours = logits(decoded(source)), logits(decoded(tmp_path / "out"))
    assert (ours - original).std() / original.std() < 0.3
    assert all(layer.seen_tokens == 256 for layer in report.layers)
    opened = OpenedCheckpoint(tmp_path / "out")
    assert opened.quantized("model.layers.0.mlp.up_proj").scale.dtype == dtype


def test_biases_stay_beside_their_quantized_weights(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "m", attention_bias=True, mlp_bias=True)

    convert(str(source), tmp_path / "out", options())

    before, after = (OpenedCheckpoint(folder).reader for folder in (source, tmp_path / "out"))
    for name in [name for name in before.names if name.endswith(".bias")]:
        assert torch.equal(before.get(name), after.get(name))
    assert (logits(decoded(tmp_path / "out")) - logits(decoded(source))).std() < 0.2 * logits(decoded(source)).std()


@pytest.mark.parametrize("depth", [2, 6])
def test_no_more_than_one_block_is_loaded_however_deep_the_model(depth: int, tokens: Path, tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "m", num_hidden_layers=depth, vocab_size=2048)
    prepared = plan_conversion(str(source), options(source=str(tokens)))
    loaded: list[set[int]] = []

    class Counting(Silent):
        def layer(self, result: LayerResult) -> None:
            blocks = enumerate(prepared.architecture.blocks)
            loaded.append({index for index, block in blocks if any(not p.is_meta for p in block.module.parameters())})
            assert prepared.architecture.model.get_input_embeddings().weight.is_meta

    run(prepared, tmp_path / "out", Counting())

    assert loaded == [{index} for index in range(depth) for _ in range(7)]
    assert all(p.is_meta for block in prepared.architecture.blocks for p in block.module.parameters())


# Other families


def test_gpt2_is_quantized_in_the_gptq_container(tmp_path: Path, options: Options) -> None:
    save_random("gpt2", tmp_path / "m")
    rows = {"input_ids": torch.randint(3, 64, (5, 32))}
    save_file(rows, tmp_path / "rows.safetensors")
    settings = {"source": str(tmp_path / "rows.safetensors"), "format": "gptq", "group_size": -1}

    convert(str(tmp_path / "m"), tmp_path / "out", options("w4a16-gptq", overrides=(".*=w8a16-channel",), **settings))

    before, after = OpenedCheckpoint(tmp_path / "m"), OpenedCheckpoint(tmp_path / "out")
    assert len(after.schemes) == 12
    for name in after.schemes:
        weight = before.get(f"{name}.weight").T
        assert (after.get(f"{name}.weight") - weight).norm() < 0.02 * weight.norm(), name


def test_a_quantized_gpt2_converts_again_without_a_turn_too_many(tmp_path: Path, options: Options) -> None:
    save_random("gpt2", tmp_path / "m")
    settings = {"format": "gptq", "group_size": -1, "overrides": (".*=w8a16-channel",)}
    convert(str(tmp_path / "m"), tmp_path / "once", options("w4a16-rtn", **settings))

    convert(str(tmp_path / "once"), tmp_path / "twice", options("w4a16-rtn", requantize=True, ignore=("c_proj",), **settings))

    before, after = OpenedCheckpoint(tmp_path / "m"), OpenedCheckpoint(tmp_path / "twice")
    for name in after.names:
        original = before.get(name).T if name.removesuffix(".weight") in after.schemes else before.get(name)
        assert (after.get(name) - original).norm() <= 0.02 * original.norm(), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w8a16"])
def test_experts_are_quantized_one_by_one_and_the_model_still_runs(recipe: str, family: str, tmp_path: Path, options: Options) -> None:
    source = save_random(family, tmp_path / "m").eval()
    save_file({"input_ids": torch.randint(3, 64, (5, 60))}, tmp_path / "rows.safetensors")

    report = convert(str(tmp_path / "m"), tmp_path / "out", options(recipe, source=str(tmp_path / "rows.safetensors"), group_size=16))

    opened = OpenedCheckpoint(tmp_path / "out")
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 3 * 4 * 3 and {opened.schemes[layer.name].name for layer in experts} == {f"w{recipe[1]}a16-g16"}
    assert sum(name.endswith(".gate.weight") for name in opened.dense_names) == 3
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file({name: opened.get(name) for name in opened.names}, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    difference = (logits(loaded, 64) - logits(source, 64)).std() / logits(source, 64).std()
    assert difference < (0.2 if recipe == "w4a16-gptq" else 0.02)


def test_experts_that_no_token_reached_are_rounded_without_it_and_said_so(tmp_path: Path, options: Options) -> None:
    save_random("qwen3_moe", tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda tensors: tensors["model.layers.0.mlp.gate.weight"].copy_(torch.tensor([3.0, 3.0, -3.0, -3.0])[:, None]))
    edit_tensors(tmp_path / "m", lambda tensors: tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1.0))
    edit_tensors(tmp_path / "m", lambda tensors: tensors["model.embed_tokens.weight"].abs_())
    save_file({"input_ids": torch.full((5, 40), 5)}, tmp_path / "rows.safetensors")

    report = convert(str(tmp_path / "m"), tmp_path / "out", options(source=str(tmp_path / "rows.safetensors"), group_size=16))

    unseen = [layer for layer in report.layers if layer.seen_tokens is None]
    assert unseen and all(".experts." in layer.name and "too few calibration tokens" in layer.note for layer in unseen)
    assert {layer.rounding for layer in unseen} == {"SearchedScales"}


def test_padding_reaches_no_expert(tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def padded(*args: object) -> CalibrationSet:
        rows = load_token_file(*args)
        rows.valid[::2, 20:] = False
        rows.position_ids = torch.where(rows.valid, rows.position_ids, (rows.position_ids - 20).clamp(min=0))
        return rows

    save_random("qwen3_moe", tmp_path / "m")
    save_file({"input_ids": torch.randint(3, 64, (20, 60))}, tmp_path / "rows.safetensors")
    monkeypatch.setattr("quantkit.conversion.rows.load_token_file", padded)

    wanted = options(source=str(tmp_path / "rows.safetensors"), num_samples=20, measure=False, group_size=16)
    report = convert(str(tmp_path / "m"), tmp_path / "out", wanted)

    config = AutoConfig.from_pretrained(tmp_path / "m")
    for kind in ("gate_proj", "down_proj"):
        seen = [layer.seen_tokens for layer in report.layers if layer.name.startswith("model.layers.1.mlp.experts.") and kind in layer.name]
        assert sum(seen) == config.num_experts_per_tok * (10 * 60 + 10 * 20)


# Again, and from Python


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_a_quantized_source_can_be_requantized(format_name: str, stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "eight", options("w8a16", format=format_name))

    convert(str(tmp_path / "eight"), tmp_path / "four", options("w4a16-gptq", requantize=True, ignore=("o_proj",)))

    opened, eight = OpenedCheckpoint(tmp_path / "four"), OpenedCheckpoint(tmp_path / "eight")
    assert {scheme.name for scheme in opened.schemes.values()} == {"w4a16-g64", "w8a16-channel"}
    assert not (tmp_path / "four" / "quantize_config.json").exists()
    for name in [name for name in opened.dense_names if "o_proj" in name]:
        assert torch.equal(opened.get(name), eight.get(name))


def test_a_layer_requantized_by_its_own_scheme_keeps_its_values(stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "once", options("w4a16-rtn"))

    convert(str(tmp_path / "once"), tmp_path / "twice", options("w4a16-mse", requantize=True))

    once, twice = OpenedCheckpoint(tmp_path / "once"), OpenedCheckpoint(tmp_path / "twice")
    for name in once.schemes:
        difference = (once.get(f"{name}.weight") - twice.get(f"{name}.weight")).norm() / once.get(f"{name}.weight").norm()
        assert difference < 2e-3, name


def test_overwrite_replaces_a_model_once_the_new_one_is_whole(stories: Path, tmp_path: Path, options: Options) -> None:
    convert(str(stories), tmp_path / "out", options("w8a16"))

    convert(str(stories), tmp_path / "out", options("w4a16-rtn", overwrite=True))

    assert {scheme.weight.bits for scheme in OpenedCheckpoint(tmp_path / "out").schemes.values()} == {4, 8}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_python_takes_the_same_options(stories: Path, tokens: Path, tmp_path: Path) -> None:
    report = quantkit.convert(str(stories), str(tmp_path / "out"), recipe="w4a16-gptq", calib=str(tokens), num_samples=4, measure=False)

    assert report.divergence is None and "4 rows x 64 tokens" in report.calibration
    with pytest.raises(UsageError, match="no option 'recpie'; did you mean 'recipe'"):
        quantkit.convert(str(stories), str(tmp_path / "other"), recpie="w4a16-gptq")


def test_python_takes_paths_sizes_and_types_as_python_has_them(stories: Path, tokens: Path, tmp_path: Path) -> None:
    settings = {"calib": tokens, "max_shard_size": "100KB", "dtype": torch.float16, "num_samples": 4, "measure": False}

    report = quantkit.convert(stories, tmp_path / "out", **settings)

    reader = OpenedCheckpoint(tmp_path / "out").reader
    assert report.calibration.startswith("calibration: 4 rows x 64 tokens") and len(reader.files) > 1
    assert reader.info("model.norm.weight").dtype == torch.float16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calib": ["a.txt"]}, r"calib is \['a.txt'\]; give a path or the name of a data set"),
        ({"max_shard_size": "5XB"}, "'5XB' is no size; write 5GB"),
        ({"max_shard_size": 5.0}, "max_shard_size is 5.0, a float; give a whole number"),
        ({"num_samples": "8"}, "num_samples is '8', a str; give a whole number"),
        ({"group_size": "32"}, "group_size is '32', a str; give a whole number or None"),
        ({"ignore": None}, "ignore is None, a NoneType; give a list of strings"),
        ({"device": None}, "device is None, a NoneType; give a string"),
        ({"dtype": None}, "dtype is None, a NoneType; give a string"),
        ({"source": None}, "source is None; give a path or a name"),
        ({"out": 3}, "out is 3; give a path or a name"),
    ],
    ids=str,
)
def test_python_refuses_other_values_in_words(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantkit.convert(**{"source": "reference", "out": tmp_path / "out"} | values)


@pytest.mark.parametrize(("num_samples", "measure", "calibrated", "held_out"), [(4, True, 4, 1), (4, False, 4, 0), (6, True, 5, 1), (2, False, 2, 0)])
def test_a_token_file_gives_the_rows_that_were_asked_for(
    num_samples: int, measure: bool, calibrated: int, held_out: int, stories: Path, tmp_path: Path, options: Options
) -> None:
    report = convert(str(stories), tmp_path / "out", options(num_samples=num_samples, measure=measure))

    assert {layer.seen_tokens for layer in report.layers} == {calibrated * 64}
    assert f"{calibrated} rows x 64 tokens" in report.calibration
    assert (report.divergence is not None) == bool(held_out) and ("held out to measure on: 1 more" in report.calibration) == bool(held_out)


def test_no_warning_reaches_the_user(stories: Path, tmp_path: Path, options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(str(stories), tmp_path / "out", options(source=None, seq_len=64))


def test_blocks_over_the_ends_of_rows_are_calibrated_layer_by_layer(stories: Path, tmp_path: Path, options: Options) -> None:
    recipe = tmp_path / "nf4.yaml"
    recipe.write_text("name: nf4-gptq\nrules: [{pattern: .*, scheme: nf4-dq, rounding: gptq}]")

    report = convert(str(stories), tmp_path / "out", options(str(recipe), format="bitsandbytes"))

    assert {layer.scheme for layer in report.layers} == {"nf4-dq"}
    original, ours = logits(decoded(stories)), logits(decoded(tmp_path / "out"))
    assert (ours - original).std() / original.std() < LARGEST_ERROR["nf4", 4]


def test_a_transform_stays_where_a_container_takes_one_group_size(stories: Path, options: Options) -> None:
    plan = plan_conversion(str(stories), options("w4a16-awq", format="awq")).plan

    assert all(layer.transform is not None and type(layer.rounding).__name__ == "ClippedToNearest" for layer in plan.layers.values())
