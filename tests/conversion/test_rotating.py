"""A rotated model is the same model: its logits, its containers' layers, its files; what does not commute is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.cli import main
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import OutputError, QuantkitError, RecipeError, UsageError
from quantkit.formats.opened import OpenedCheckpoint
from tests.conversion.conftest import contents, edit_config, edit_tensors, save_tiny
from tests.conversion.test_kv_cache import in_transformers_cache, stored
from tests.conversion.test_resume import stopped
from tests.conversion.test_verify import failed

Options = Callable[..., ConvertOptions]
ONLY = "name: only\nrules: [{pattern: '.', scheme: none}]\nrotation: hadamard\n"
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
       "decoder_sparse_step": 1}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "llama without groups": {"num_key_value_heads": 4},
    "llama 96 wide": {"hidden_size": 96, "head_dim": 24},
    "llama 92 wide": {"hidden_size": 92},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma tied": {"tie_word_embeddings": True},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 7.0, "logits_scaling": 3.0},
    "phi3": {},
    "mixtral": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe tied": MOE | {"tie_word_embeddings": True},
}


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 63).reshape(2, 30)).logits


def recipe(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def dense_copy(out: Path, folder: Path) -> Path:
    """What a checkpoint stands for, in float32."""
    opened = OpenedCheckpoint(out)
    folder.mkdir()
    save_file({name: opened.get(name).float() for name in opened.names}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((out / "config.json").read_text())
    return edit_config(folder, quantization_config=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rotated_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", family=name.split()[0], **FAMILIES[name])

    report = convert(str(source), tmp_path / "out", ConvertOptions(recipe=recipe(tmp_path / "r", ONLY)))

    before, after = logits_of(source), logits_of(tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-4 * float(before.abs().max()))
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    matrices = [name for name, tensor in old.items() if tensor.ndim == 2]
    assert not any(torch.allclose(new[name], old[name], atol=1e-3) for name in matrices if "shared_expert_gate" not in name)
    assert any("heads between values" in note for note in report.notes)


def test_a_tied_head_becomes_a_tensor_of_its_own_and_its_bytes_are_counted(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)

    report = convert(str(source), tmp_path / "out", ConvertOptions(recipe=recipe(tmp_path / "r", ONLY)))

    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.allclose(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert report.bytes_after - report.bytes_before >= 96 * 64 * 4
    assert any("lm_head.weight is stored too" in note for note in report.notes)


def test_a_nested_configuration_says_so_of_its_head_too(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)
    rotation = plan_conversion(str(source), ConvertOptions(recipe=recipe(tmp_path / "only", ONLY))).rotation
    assert rotation is not None

    config = rotation.configured({"text_config": {"tie_word_embeddings": True, "hidden_size": 64}, "model_type": "two"})

    assert config == {"text_config": {"tie_word_embeddings": False, "hidden_size": 64}, "model_type": "two", "tie_word_embeddings": False}
    assert rotation.configured({"text_config": {"hidden_size": 64}})["text_config"] == {"hidden_size": 64}


def test_norms_lose_their_gains_and_heads_are_left_alone_where_the_recipe_says_so(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", num_key_value_heads=4)

    convert(str(source), tmp_path / "with", ConvertOptions(recipe=recipe(tmp_path / "r", ONLY)))
    states_alone = ONLY.replace("hadamard", "{name: hadamard, heads: false}")
    convert(str(source), tmp_path / "without", ConvertOptions(recipe=recipe(tmp_path / "r", states_alone)))

    old, both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny", "with", "without"))
    assert all(bool((tensor == 1).all()) for name, tensor in both.items() if "norm" in name)
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(alone[name].T @ alone[name], old[name].T @ old[name], rtol=1e-4, atol=1e-4)  # only its outputs were turned
    assert not torch.allclose(both[name].T @ both[name], old[name].T @ old[name], atol=1e-2)
    head = slice(0, 16)
    value = "model.layers.0.self_attn.v_proj.weight"
    grams = [both[value][head].T @ both[value][head], alone[value][head].T @ alone[value][head]]
    torch.testing.assert_close(*grams, rtol=1e-4, atol=1e-4)  # every head was turned within itself


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, words", [
    ("gpt2", "LayerNorm"), ("cohere", "CohereLayerNorm"), ("gemma2", "post_attention_layernorm"), ("olmo2", "post_attention_layernorm"),
    ("gpt_oss", "mlp.experts"),
])  # fmt: skip
def test_what_does_not_commute_is_refused_before_any_work(family: str, words: str, tmp_path: Path) -> None:
    more = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, "gpt_oss": MOE}
    config = more.get(family, {})
    source = save_tiny(tmp_path / "tiny", family=family, **config)

    container = "gptq" if family == "gpt2" else None  # which takes its Conv1Ds
    with pytest.raises(RecipeError, match=f"cannot be rotated: .*{words}.*; leave the rotation out"):
        convert(str(source), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", format=container, rotation="hadamard"))

    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_layer_that_transformers_does_not_build_refuses_a_rotation(tmp_path: Path) -> None:
    source = edit_tensors(save_tiny(tmp_path / "tiny"), lambda tensors: tensors.update({"mtp.proj.weight": torch.randn(64, 64)}))

    with pytest.raises(RecipeError, match=r"mtp\.proj"):
        convert(str(source), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", rotation="hadamard"))


@pytest.mark.parametrize("content, words", [
    ("hadamart", "did you mean 'hadamard'"), ("{name: hadamard, sed: 1}", "unknown key 'rotation.sed'; did you mean 'seed'"),
    ("{name: hadamard, seed: -1}", "rotation.seed"), ("{seed: 1}", "has no name"), ("{name: hadamard, heads: 2}", "rotation.heads"),
    ("3", "rotation"),
])  # fmt: skip
def test_a_rotation_that_cannot_be_meant_is_refused_by_name(content: str, words: str, tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        convert(str(tiny), tmp_path / "out", ConvertOptions(recipe=recipe(tmp_path / "r", ONLY.replace("hadamard", content))))


def test_a_rotation_among_transforms_says_where_it_belongs(tmp_path: Path, tiny: Path) -> None:
    text = "name: x\nrules: [{pattern: '.', scheme: w4a16, transforms: [hadamard]}]\n"
    with pytest.raises(RecipeError, match="`rotation: hadamard` beside the rules"):
        convert(str(tiny), tmp_path / "out", ConvertOptions(recipe=recipe(tmp_path / "r", text)))


def test_none_takes_a_recipes_rotation_away(tmp_path: Path, tiny: Path) -> None:
    text = "name: x\nrules: [{pattern: '.', scheme: w8a16, rounding: rtn}]\nrotation: hadamard\n"
    convert(str(tiny), tmp_path / "out", ConvertOptions(recipe=recipe(tmp_path / "r", text), rotation="none"))

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], load_file(tiny / "model.safetensors")["lm_head.weight"])
    with pytest.raises(QuantkitError, match="unknown rotation 'spin'"):
        ConvertOptions(rotation="spin")


def test_a_rotation_is_not_for_moving_codes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a rotation"):
        ConvertOptions(format="bf16", rotation="hadamard")


@pytest.mark.parametrize("name", ["w8a16", "w8a8-int8", "w4a16-awq", "w4a16-gptaq", "w4a16-gptq"])
def test_a_rotated_model_is_quantized_like_any_other(name: str, tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)

    report = convert(str(source), tmp_path / "out", options(name, rotation="hadamard", group_size=None))

    before, after = logits_of(source), logits_of(dense_copy(tmp_path / "out", tmp_path / "dense"))
    error = ((after - before).norm() / before.norm()).item()
    assert error < (0.02 if name.startswith("w8") else 0.3)
    assert (report.divergence is None) == (name == "w8a16")
    assert report.divergence is None or 0 < report.divergence["kl_mean"] < 0.1
    assert failed(verify(tmp_path / "out", against=str(source), options=VerifyOptions(num_tokens=0))) == {}


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)
    convert(str(source), tmp_path / "whole", options(rotation="hadamard"))

    class Stopping:
        def started(self, num_blocks: int) -> None: ...
        def layer(self, result: object) -> None: ...
        def stage(self, text: str) -> None: ...
        def block(self, index: int, results: object, *, resumed: bool) -> None:
            if index == 0 and not resumed:
                raise KeyboardInterrupt

    with pytest.raises(QuantkitError, match="stopped"):
        convert(str(source), tmp_path / "out", options(rotation="hadamard"), Stopping())
    convert(str(source), tmp_path / "out", options(rotation="hadamard"))

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("after", ["rotation: {name: hadamard, seed: 1}\n", ""], ids=["another seed", "none"])
def test_a_stopped_run_does_not_go_on_with_another_rotation(after: str, tmp_path: Path, options: Options) -> None:
    source, rules = save_tiny(tmp_path / "tiny"), "name: own\nrules: [{pattern: .*, scheme: w4a16, rounding: gptq}]\n"
    stopped(source, tmp_path / "out", options(recipe(tmp_path / "before", f"{rules}rotation: hadamard\n")))

    with pytest.raises(OutputError, match=r"holds the unfinished work of another run: rotation was .*seed"):
        convert(str(source), tmp_path / "out", options(recipe(tmp_path / "after", rules + after)))


def test_verify_takes_a_plain_copy_of_a_rotated_model_for_what_it_is(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True, dtype=torch.bfloat16)
    convert(str(source), tmp_path / "rotated", ConvertOptions(recipe=recipe(tmp_path / "only", ONLY), measure=False))
    convert(str(tmp_path / "rotated"), tmp_path / "copy", ConvertOptions(format="bf16"))

    for against in ("rotated", "tiny"):
        assert failed(verify(tmp_path / "copy", against=str(tmp_path / against), options=VerifyOptions(num_tokens=0))) == {}, against


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_verify_finds_a_tensor_that_is_not_the_rotated_originals(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True, dtype=torch.bfloat16)
    convert(str(source), tmp_path / "out", ConvertOptions(recipe="w8a16", rotation="hadamard"))
    edit_tensors(tmp_path / "out", lambda tensors: tensors[name][..., 0].mul_(-1))

    result = failed(verify(tmp_path / "out", against=str(source), options=VerifyOptions(num_tokens=0)))

    assert list(result) == ["rotated tensors"] and name in result["rotated tensors"]


def test_verify_measures_layers_by_the_rotated_original(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)
    convert(str(source), tmp_path / "out", ConvertOptions(recipe="w8a16", rotation="hadamard"))

    result = verify(tmp_path / "out", against=str(source), options=VerifyOptions(num_tokens=0))

    assert len(result.layer_errors) == 14 and max(result.layer_errors.values()) < 1e-3


def test_what_was_measured_on_another_model_does_not_choose_schemes_for_the_rotated_one(tmp_path: Path, tiny: Path, options: Options) -> None:
    chosen = {"target_bpw": 6.0, "allocation": str(tmp_path / "measured.json")}
    convert(str(tiny), tmp_path / "plain", options(**chosen))

    with pytest.raises(UsageError, match="after another rotation, or none"):
        convert(str(tiny), tmp_path / "out", options(**chosen, rotation="hadamard"))
    report = convert(str(tiny), tmp_path / "out", options(**chosen | {"allocation": str(tmp_path / "rotated.json")}, rotation="hadamard"))
    assert report.linear_bpw <= 6.0


def test_what_was_measured_with_another_seed_is_refused_too(tmp_path: Path, tiny: Path, options: Options) -> None:
    rules = "name: own\nrules: [{pattern: .*, scheme: w4a16, rounding: gptq}]\n"
    own = [recipe(tmp_path / str(seed), f"{rules}rotation: {{name: hadamard, seed: {seed}}}\n") for seed in (0, 5)]
    chosen = {"target_bpw": 6.0, "allocation": str(tmp_path / "measured.json")}
    convert(str(tiny), tmp_path / "first", options(own[0], **chosen))

    with pytest.raises(UsageError, match="after another rotation, or none"):
        convert(str(tiny), tmp_path / "out", options(own[1], **chosen))


def test_the_scales_of_a_kv_cache_are_those_of_the_rotated_values(tmp_path: Path, tiny: Path, tokens: Path, options: Options) -> None:
    convert(str(tiny), tmp_path / "plain", options(kv_cache="fp8", ignore=(".*",)))
    convert(str(tiny), tmp_path / "out", options(kv_cache="fp8", ignore=(".*",), rotation="hadamard"))

    rows = load_file(tokens)["input_ids"][:4]
    for layer, (_, values) in enumerate(in_transformers_cache(dense_copy(tmp_path / "out", tmp_path / "dense"), rows)):
        keys, found = stored(tmp_path / "out", layer)
        torch.testing.assert_close(found.float(), values.max()[None] / 448, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(keys, stored(tmp_path / "plain", layer)[0], rtol=1e-3, atol=1e-7)  # no rotation reaches keys


def test_a_dry_run_says_what_is_rotated_and_what_the_head_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)

    with pytest.raises(SystemExit):
        main(["convert", str(source), "-o", str(tmp_path / "out"), "-r", "w8a16", "--rotation", "hadamard", "--dry-run", "--json"])

    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert plan["notes"][0] == "hidden states are rotated (Hadamard 64), and heads between values and attention's output (Hadamard 16)"
    assert "lm_head.weight is stored too" in plan["notes"][1]
    convert(str(source), tmp_path / "out", ConvertOptions(recipe="w8a16", rotation="hadamard"))
    assert plan["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("recipe", "times"), [("w8a8-int8", 8), ("w4a8", 2)])
def test_a_rotation_takes_away_what_outlying_channels_cost(recipe: str, times: int, tmp_path: Path, options: Options) -> None:
    def stretch(tensors: dict[str, torch.Tensor]) -> None:
        """A few channels of every norm 40 times as large, and what reads them as much less: the same model."""
        readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
        for layer in range(2):
            for norm, linears in readers.items():
                tensors[f"model.layers.{layer}.{norm}.weight"][:2] *= 40
                for linear in linears:
                    tensors[f"model.layers.{layer}.{linear}.weight"][:, :2] /= 40

    source = edit_tensors(save_tiny(tmp_path / "tiny"), stretch)

    plain = convert(str(source), tmp_path / "plain", options(recipe))
    rotated = convert(str(source), tmp_path / "rotated", options(recipe, rotation="hadamard"))

    assert plain.divergence is not None and rotated.divergence is not None
    assert rotated.divergence["kl_mean"] < plain.divergence["kl_mean"] / times


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", ["compressed-tensors", "bitsandbytes"])
def test_transformers_loads_what_was_rotated_and_quantized(container: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", tie_word_embeddings=True)
    name = "w4a16-rtn" if container == "compressed-tensors" else "nf4"
    convert(str(source), tmp_path / "out", ConvertOptions(recipe=name, format=container, rotation="hadamard"))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        loaded = model(torch.arange(3, 63).reshape(2, 30)).logits

    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    expected = logits_of(dense_copy(tmp_path / "out", tmp_path / "dense"))
    error = float((loaded - expected).norm() / expected.norm())
    assert error < (1e-5 if container == "compressed-tensors" else 0.02)  # bitsandbytes' 4-bit models run in bfloat16
