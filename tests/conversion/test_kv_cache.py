"""Scales of a KV cache as transformers' own cache would show them, stored as compressed-tensors stores them, and refused where they cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.cli import main
from quantkit.conversion.convert import Silent, convert
from quantkit.conversion.kv_cache import KVPeaks
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import FormatError, Interrupted, QuantkitError, RecipeError
from tests.conversion.conftest import contents, edit_tensors, save_tiny
from tests.conversion.test_convert import decoded

Options = Callable[..., ConvertOptions]
LEFT_ALONE = {"ignore": (".*",)}
"""Of the weights, so that the original model's cache is the truth for every layer."""


def in_transformers_cache(folder: Path, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The largest magnitudes of keys and values, [heads], that a forward pass leaves in the cache of each layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(rows, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    return [(layer.keys.abs().amax((0, 2, 3)), layer.values.abs().amax((0, 2, 3))) for layer in cache.layers]


def stored(out: Path, layer: int, at: str = "model.layers.{}.self_attn") -> tuple[Tensor, Tensor]:
    tensors = load_file(out / "model.safetensors")
    return tensors[f"{at.format(layer)}.k_scale"], tensors[f"{at.format(layer)}.v_scale"]


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers.{}.self_attn", {}),
    "qwen3": ("model.layers.{}.self_attn", {}),
    "phi3": ("model.layers.{}.self_attn", {}),
    "gemma3_text": ("model.layers.{}.self_attn", {"sliding_window": 128, "query_pre_attn_scalar": 16}),
    "mixtral": ("model.layers.{}.self_attn", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neox": ("gpt_neox.layers.{}.attention", {"num_key_value_heads": 4}),
    "gpt2": ("transformer.h.{}.attn", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("kind", ["fp8", "fp8-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_those_of_transformers_own_cache(family: str, kind: str, tokens: Path, tmp_path: Path, options: Options) -> None:
    at, config = FAMILIES[family]
    source = save_tiny(tmp_path / family, family=family, **config)

    convert(str(source), tmp_path / "out", options(kv_cache=kind, **LEFT_ALONE))

    for layer, peaks in enumerate(in_transformers_cache(source, load_file(tokens)["input_ids"][:4])):
        for found, peak in zip(stored(tmp_path / "out", layer, at), peaks, strict=True):
            assert found.shape == ((1,) if kind == "fp8" else (len(peak), 1, 1)) and found.dtype == torch.float16
            expected = (peak.max()[None] if kind == "fp8" else peak) / 448
            torch.testing.assert_close(found.float().flatten(), expected, rtol=1e-3, atol=1e-7)
    assert verify(tmp_path / "out", options=VerifyOptions(num_tokens=0)).ok


@pytest.mark.parametrize(("kind", "strategy"), [("fp8", "tensor"), ("fp8-head", "attn_head")])
def test_the_config_asks_for_the_cache_as_compressed_tensors_has_it(
    kind: str, strategy: str, tiny: Path, tmp_path: Path, options: Options
) -> None:
    report = convert(str(tiny), tmp_path / "out", options("w4a16-rtn", kv_cache=kind))

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    assert arguments.model_validate(config["kv_cache_scheme"]).strategy == strategy
    assert report.calibration is not None and report.kv_cache == quantkit.inspect(str(tmp_path / "out")).kv_cache.removesuffix("; 4 stored")
    assert Recipe.load(str(tmp_path / "out" / "recipe.yaml")).kv_cache_scheme == kind


def test_what_the_quantized_layers_put_into_the_cache_is_what_counts(tiny: Path, tmp_path: Path, options: Options, tokens: Path) -> None:
    coarse = {"recipe": "w4a16-rtn", "overrides": (".*=w2a16-g32",)}
    convert(str(tiny), tmp_path / "weights", options(**coarse))
    decoded(tmp_path / "weights").save_pretrained(tmp_path / "decoded")

    convert(str(tiny), tmp_path / "out", options(**coarse, kv_cache="fp8"))

    ours, originals = (in_transformers_cache(folder, load_file(tokens)["input_ids"][:4]) for folder in (tmp_path / "decoded", tiny))
    for layer in range(2):
        for found, peak, original in zip(stored(tmp_path / "out", layer), ours[layer], originals[layer], strict=True):
            assert found.item() == pytest.approx(peak.max().item() / 448, rel=1e-3)
            assert found.item() != pytest.approx(original.max().item() / 448, rel=1e-2)


def test_padding_is_not_counted(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[2, 0] = 10  # of token 2 alone, and the first layer's keys and values make much of it
        for projection in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj):
            projection.weight[:, 0] *= 50
    whole, padded = KVPeaks(), KVPeaks()
    valid = torch.ones(4, 32, dtype=torch.bool)
    valid[:, 20:] = False

    with torch.no_grad():
        with whole.watching(model, valid[:, :20]):
            model(ids[:, :20], use_cache=False)
        with padded.watching(model, valid):
            model(ids.masked_fill(~valid, 2), use_cache=False)

    assert whole.peaks.keys() == padded.peaks.keys() == {0, 1}
    for layer in range(2):
        for alone, found in zip(whole.peaks[layer], padded.peaks[layer], strict=True):
            torch.testing.assert_close(found, alone)


def test_a_head_that_keeps_nothing_takes_its_layers_scale(tiny: Path, tmp_path: Path, options: Options) -> None:
    edit_tensors(tiny, lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"][:16].zero_())
    edit_tensors(tiny, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].zero_())

    convert(str(tiny), tmp_path / "out", options(kv_cache="fp8-head", **LEFT_ALONE))

    (_, first), (_, second) = (stored(tmp_path / "out", layer) for layer in range(2))
    assert first.flatten()[0] == first.flatten()[1] > 0 and second.flatten().tolist() == [1, 1]
    assert verify(tmp_path / "out", options=VerifyOptions(num_tokens=0)).ok


def test_measured_divergence_is_that_of_the_cache(stories: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(stories), tmp_path / "out", options(kv_cache="fp8", **LEFT_ALONE))

    assert 0 < report.divergence["kl_mean"] < 0.01
    checked = {check.name: check.detail for check in verify(tmp_path / "out", against=str(stories), options=VerifyOptions(num_tokens=512)).checks}
    assert not checked["KL divergence"].startswith("0.00000 ")


class Stopping(Silent):
    """Stops the run at one block."""

    def __init__(self, at: int) -> None:
        self.at = at

    def block(self, index: int, results: list[Any], *, resumed: bool) -> None:
        if index == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 4])
def test_a_run_that_was_stopped_ends_with_the_same_scales(at: int, stories: Path, tmp_path: Path, options: Options) -> None:
    wanted = options("fp8-static", kv_cache="fp8-head")
    convert(str(stories), tmp_path / "whole", wanted)

    with pytest.raises(Interrupted):
        convert(str(stories), tmp_path / "out", wanted, Stopping(at))
    convert(str(stories), tmp_path / "out", wanted)

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_quantizing_again_leaves_old_scales_out_or_makes_new_ones(tiny: Path, tmp_path: Path, options: Options) -> None:
    first = tmp_path / "first"
    convert(str(tiny), first, options("w8a16", kv_cache="fp8"))

    without = convert(str(first), tmp_path / "without", options("w4a16-rtn", requantize=True))
    again = convert(str(first), tmp_path / "again", options("w4a16-rtn", requantize=True, kv_cache="fp8-head"))

    assert any("4 scales of its KV cache are left out" in note and "--kv-cache calibrates new ones" in note for note in without.notes)
    assert quantkit.inspect(str(tmp_path / "without")).kv_cache is None
    assert any("new ones are calibrated" in note for note in again.notes)
    assert quantkit.inspect(str(tmp_path / "again")).kv_cache == "FP8 (e4m3), one scale a head; 4 stored"
    for out in ("without", "again"):
        assert verify(tmp_path / out, against=str(first), options=VerifyOptions(num_tokens=0)).ok


MAPPING = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("written", "name"),
    [("fp8", "fp8"), (MAPPING, "fp8"), (MAPPING | {"strategy": "attn_head"}, "fp8-head"), ({"num_bits": 8, "type": "float"}, "fp8"), ("none", None)],
)
def test_a_recipe_names_the_cache_or_describes_it_as_checkpoints_do(written: Any, name: str | None) -> None:
    text = json.dumps({"name": "mine", "rules": [{"pattern": ".*", "scheme": "w4a16"}], "kv_cache_scheme": written})

    recipe = Recipe.parse(text, "mine")

    assert recipe.kv_cache_scheme == name and Recipe.parse(recipe.to_yaml(), "mine") == recipe
    assert recipe.changed(kv_cache="none").kv_cache_scheme is None and recipe.changed(kv_cache="fp8-head").kv_cache_scheme == "fp8-head"


@pytest.mark.parametrize("written", [MAPPING | {"type": "int"}, MAPPING | {"dynamic": True}, MAPPING | {"group": 3}, "int8", 8])
def test_a_cache_that_cannot_be_calibrated_is_refused_by_name(written: Any) -> None:
    text = json.dumps({"name": "mine", "rules": [{"pattern": ".*", "scheme": "w4a16"}], "kv_cache_scheme": written})

    with pytest.raises(RecipeError, match=r"recipe mine: .*(cannot be calibrated; those that can are fp8|unknown KV cache)"):
        Recipe.parse(text, "mine")


def refusal(source: Path, tmp_path: Path, wanted: ConvertOptions, error: type[QuantkitError]) -> str:
    with pytest.raises(error) as raised:
        convert(str(source), tmp_path / "out", wanted)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    return str(raised.value)


@pytest.mark.parametrize("container", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_containers_without_a_place_for_them_are_refused_before_work(container: str, tiny: Path, tmp_path: Path, options: Options) -> None:
    recipe = {"fp8": "fp8-static", "bitsandbytes": "nf4"}.get(container, "w4a16-rtn")
    group = {} if container in ("fp8", "bitsandbytes") else {"group_size": 32}
    group |= {"overrides": (".*=w4a16-asym-g32",)} if container == "awq" else {}

    message = refusal(tiny, tmp_path, options(recipe, format=container, kv_cache="fp8", **group), FormatError)

    assert message == f"{container} has no place for the scales of a KV cache; use compressed-tensors, or leave --kv-cache out"


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 4, "num_hidden_layers": 2}, "layer 0 of MambaForCausalLM keeps no keys and values"),
    "minimax": (
        {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "block_size": 16},
        "layer 1 of MiniMaxForCausalLM keeps no keys and values",
    ),
    "deepseek_v3": (
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 2,
         "num_key_value_heads": 4},
        "engines keep latents of model.layers.0.self_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", UNLIKE)
def test_models_whose_cache_is_another_are_refused_before_work(family: str, tmp_path: Path, options: Options) -> None:
    config, words = UNLIKE[family]
    source = save_tiny(tmp_path / family, family=family, **config)

    assert words in refusal(source, tmp_path, options("w8a16", kv_cache="fp8"), RecipeError)


def test_a_config_that_counts_other_heads_than_the_layers_have_is_caught(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "neox", family="gpt_neox", num_key_value_heads=2)  # which is nothing to this family

    with pytest.raises(QuantkitError, match=r"the layer keeps 4 heads, and the config says 2"):
        convert(str(source), tmp_path / "out", options(kv_cache="fp8-head", **LEFT_ALONE))


def test_the_command_prints_the_cache_before_and_after(
    tiny: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--calib", str(tokens), "--num-samples", "4"]
    command = ["convert", str(tiny), "-o", str(tmp_path / "out"), "-r", "fp8-static", "--kv-cache", "fp8", *data]
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 0
        assert "FP8 (e4m3), one scale a tensor" in " ".join(capsys.readouterr().out.split())


def test_a_model_whose_layers_all_stay_needs_a_cache_to_be_worth_converting(tiny: Path, tmp_path: Path, options: Options) -> None:
    assert "leaves nothing to quantize" in refusal(tiny, tmp_path, options(**LEFT_ALONE), RecipeError)

    convert(str(tiny), tmp_path / "out", options(kv_cache="fp8", **LEFT_ALONE))

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["config_groups"], config["format"]) == ({}, "dense")
    assert verify(tmp_path / "out", against=str(tiny), options=VerifyOptions(num_tokens=0)).ok
