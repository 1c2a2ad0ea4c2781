"""What a conversion will do is known from headers: schemes by the group rule, types and sizes of every tensor, what stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.plan import Plan
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import RecipeError, UsageError
from tests.conversion.conftest import edit_config, edit_tensors, save_tiny
from tests.conversion.test_verify import failed
from tests.models.test_families import FAMILIES as MORE
from tests.models.test_families import save_random as save_family
from tests.models.test_streaming import FAMILIES, save_random


def planned(source: Path, recipe: str = "w4a16-rtn", **options) -> Plan:
    return plan_conversion(str(source), ConvertOptions(recipe=recipe, **options)).plan


def schemes(plan: Plan) -> dict[str, str]:
    """Scheme by the last word of a layer's name, for the first block."""
    return {name.rpartition(".")[2]: layer.scheme.name for name, layer in plan.layers.items() if ".0." in name}


@pytest.mark.parametrize(
    ("hidden", "inter", "qkv", "down"),
    [(256, 384, "w4a16", "w4a16"), (64, 192, "w4a16-g64", "w4a16-g64"), (96, 160, "w4a16-g32", "w4a16-g32"), (64, 172, "w4a16-g64", "w8a16-channel")],
)
def test_a_recipe_s_group_falls_layer_by_layer_to_the_largest_that_divides(hidden: int, inter: int, qkv: str, down: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", hidden_size=hidden, intermediate_size=inter)

    plan = planned(source)

    assert (schemes(plan)["q_proj"], schemes(plan)["down_proj"]) == (qkv, down)
    note = plan.layers["model.layers.0.mlp.down_proj"].note
    assert (note is None) == (down == "w4a16") and (note is None or down in note)


def test_the_recipe_states_the_fallback(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", intermediate_size=172)
    (tmp_path / "mine.yaml").write_text("name: mine\nfallback: w6a16-channel\nrules: [{pattern: .*, scheme: w4a16, rounding: rtn}]")
    (tmp_path / "none.yaml").write_text("name: mine\nfallback: none\nrules: [{pattern: .*, scheme: w4a16, rounding: rtn}]")

    assert schemes(planned(source, str(tmp_path / "mine.yaml")))["down_proj"] == "w6a16-channel"
    plan = planned(source, str(tmp_path / "none.yaml"))
    assert "down_proj" not in schemes(plan) and "172 columns" in plan.left_alone["model.layers.0.mlp.down_proj"]


def test_a_group_of_the_user_s_is_taken_as_it_is(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", intermediate_size=172)

    assert set(schemes(planned(source, group_size=-1)).values()) == {"w4a16-channel"}
    mixed = schemes(planned(source, group_size=16, overrides=("down_proj=w8a16-channel",)))
    assert (mixed["q_proj"], mixed["down_proj"]) == ("w4a16-g16", "w8a16-channel")


def test_the_mixed_recipe_gives_eight_bits_to_down_projections(tiny: Path) -> None:
    found = schemes(planned(tiny, "w4a16-mixed-gptq"))

    assert found["down_proj"] == "w8a16" and found["up_proj"] == "w4a16-g64"


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_every_tensor_is_written_as_planned(format_name: str, stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", dtype=stored, num_hidden_layers=1)
    options = ConvertOptions(recipe="w4a16-rtn", format=format_name, dtype=dtype)
    plan = plan_conversion(str(source), options).plan

    report = convert(str(source), tmp_path / "out", options)

    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        written = {name: (file.get_tensor(name).dtype, tuple(file.get_tensor(name).shape)) for name in file.keys()}  # noqa: SIM118
    assert written == {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    carried = {name: kind for name, (kind, _) in written.items() if name in plan.carried}
    assert set(carried.values()) == {stored if dtype == "auto" else getattr(torch, dtype)}
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_bits_per_weight_count_codes_and_scales_and_not_the_shapes_beside_them(tiny: Path) -> None:
    plan = planned(tiny)

    weights = sum(layer.linear.shape[0] * layer.linear.shape[1] for layer in plan.layers.values())
    stored = sum(tensor.nbytes for tensor in plan.tensors if tensor.name not in plan.carried and not tensor.name.endswith("weight_shape"))
    assert plan.linear_bpw == 8 * stored / weights
    assert 4 + 16 / 128 < plan.linear_bpw < 4.4
    parameters = weights + 2 * 96 * 64 + 5 * 64
    assert plan.parameters == parameters and plan.file_bpw == 8 * plan.bytes_after / parameters


def test_layers_no_rule_names_are_left_alone_and_said_so(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nrules: [{pattern: up_proj, scheme: w4a16, rounding: rtn}]")

    plan = planned(tiny, str(tmp_path / "mine.yaml"), ignore=(r"layers\.0",))

    assert list(plan.layers) == ["model.layers.1.mlp.up_proj"]
    assert plan.left_alone["model.layers.1.mlp.down_proj"] == "no rule of the recipe names it"
    assert plan.left_alone["model.layers.0.mlp.up_proj"] == r"ignored by 'layers\\.0'"
    assert plan.left_alone["lm_head"] == "outside the decoder blocks"
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"} <= set(plan.ignored)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_every_family_is_planned(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)

    plan = planned(tmp_path, "w4a16-gptq", group_size=-1)

    blocks = {name.split(".")[i + 1] for name in plan.layers for i, part in enumerate(name.split(".")) if part in ("layers", "h")}
    assert blocks == {"0", "1", "2"}
    assert not any("embed" in name or "wte" in name for name in plan.layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_planned_one_by_one_and_routers_are_left_alone(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)

    plan = planned(tmp_path)

    assert sum(".experts.3." in name for name in plan.layers) == 3 * 3
    routers = {name: why for name, why in plan.left_alone.items() if name.endswith(".gate")}
    assert len(routers) == 3 and all("outer" in why for why in routers.values())
    gates = {name.removesuffix(".weight") for name in CheckpointReader(tmp_path).names if name.endswith(".gate.weight")}
    assert len(gates) == 3 and gates <= set(plan.ignored)
    assert not any(name.endswith(".gate") for name in plan.layers)


def test_a_tied_head_that_is_stored_all_the_same_has_its_place(tiny: Path) -> None:
    edit_config(tiny, tie_word_embeddings=True)

    assert planned(tiny).left_alone == {"lm_head": "outside the decoder blocks"}


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_layers_that_transformers_does_not_build_are_left_alone_by_name(format_name: str, tiny: Path, tmp_path: Path) -> None:
    surplus = ("model.layers.2.mlp.up_proj", "model.layers.2.mlp.experts.gate_up_proj")
    edit_tensors(tiny, lambda t: t.update({f"{surplus[0]}.weight": torch.ones(32, 64), surplus[1]: torch.ones(2, 3, 4)}))
    edit_tensors(tiny, lambda t: t.update({"model.layers.2.norm.weight": torch.ones(64)}))

    report = convert(str(tiny), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", format=format_name, ignore=(r"layers\.2\.",)))

    assert report.left_alone == {"lm_head": "outside the decoder blocks"} | dict.fromkeys(surplus, "transformers builds no module for it")
    config = CheckpointReader(tmp_path / "out").quantization_config
    skipped = [re.sub(r"\\", "", entry[3:-1]) for entry in config.get("dynamic", ()) if entry.startswith("-:")]
    assert (config["ignore"] == ["lm_head", surplus[0]]) if format_name == "compressed-tensors" else (skipped == [surplus[0]])
    assert failed(verify(tmp_path / "out", against=str(tiny), options=VerifyOptions(num_tokens=0))) == {}
    with pytest.raises(RecipeError, match=r"layers.*2' matches only model.layers.2.mlp.*which stays as it is: transformers builds no"):
        planned(tiny, overrides=(r"layers\.2=w8a16",))


def test_compressed_tensors_leaves_a_conv1d_alone_and_gptq_takes_it(tmp_path: Path) -> None:
    save_random("gpt2", tmp_path)

    with pytest.raises(RecipeError, match=r"leaves nothing to quantize: .*c_attn and 11 more: a Conv1D, .* those of gptq do"):
        planned(tmp_path, group_size=-1)
    plan = planned(tmp_path, group_size=-1, format="gptq")
    assert plan.layers["transformer.h.0.attn.c_attn"].linear.shape == (96, 32)


def test_a_plan_reads_no_weights(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.checkpoint.reader.CheckpointReader.get", None)

    assert len(planned(tiny, "w4a16-gptq").layers) == 14


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["lfm3", "minimax_m2"])
def test_layers_are_listed_by_both_names_where_the_file_and_the_module_tree_differ(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path, MORE.get(family, {}))

    plan = planned(tmp_path, overrides=("gate_proj|o_proj=w8a16",))

    renamed = {layer.linear.name: layer.linear.path for layer in plan.layers.values() if layer.linear.name != layer.linear.path}
    assert renamed and all(plan.schemes[name] == plan.schemes[path] for name, path in renamed.items())
    config = plan.format.config(plan.schemes, plan.ignored)
    targets = {target for group in config["config_groups"].values() for target in group["targets"]}
    assert len(config["config_groups"]) > 1 and targets >= renamed.keys() | set(renamed.values())


@pytest.mark.parametrize("name", ["ignore", "overrides"])
def test_a_string_where_a_list_is_meant_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} is the string 'layers'; give a list"):
        ConvertOptions(**{name: "layers"})


def test_calibration_data_that_nothing_reads_is_said(stories: Path) -> None:
    plan = plan_conversion(str(stories), ConvertOptions(recipe="w4a16-rtn", calibration=CalibrationOptions("mine.txt"))).plan

    assert plan.notes == ["recipe w4a16-rtn needs no calibration, so mine.txt is not read"]


def test_planned_bytes_are_those_of_the_files(stories: Path, tmp_path: Path) -> None:
    options = ConvertOptions(recipe="w4a16-rtn", max_shard_size=100_000)
    report = convert(str(stories), tmp_path / "out", options)

    assert plan_conversion(str(stories), options).plan.bytes_after == report.bytes_after == CheckpointReader(tmp_path / "out").total_bytes
    assert report.bytes_before == CheckpointReader(stories).total_bytes


@pytest.mark.parametrize(("recipe", "asked", "container"), [
    ("nf4", None, "bitsandbytes"), ("fp4", None, "bitsandbytes"), ("int8", None, "bitsandbytes"), ("w4a16-rtn", None, "compressed-tensors"),
    ("w4a16-rtn", "gptq", "gptq"), ("nf4", "bitsandbytes", "bitsandbytes"),
])  # fmt: skip
def test_a_recipe_goes_into_its_own_container_unless_another_is_asked_for(tiny: Path, recipe: str, asked: str | None, container: str) -> None:
    assert planned(tiny, recipe, format=asked).format.name == container


def test_layers_that_engines_join_fall_together_where_blocks_fit_some_of_them(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=1, head_dim=64)
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "fp8-dynamic") | {"o_proj": "fp8-block"}

    plan = planned(source, "fp8-block", target_engines=("vLLM",))

    assert {name: scheme for name, scheme in schemes(plan).items() if name in attention} == attention
    name = "model.layers.0.self_attn.q_proj"
    assert plan.layers[name].note.startswith("engines join it with model.layers.0.self_attn.k_proj")
    asked = planned(source, "fp8-block", overrides=("v_proj=w8a16-channel",))
    assert [schemes(asked)[leaf] for leaf in ("q_proj", "k_proj", "v_proj")] == ["fp8-block", "fp8-dynamic", "w8a16-channel"]
    alone = planned(source, "fp8-block", format="fp8", target_engines=("vLLM",))
    assert name in alone.left_alone and "model.layers.0.self_attn.o_proj" in alone.layers


def test_scales_for_a_cache_are_no_stand_in_for_a_recipe_that_quantizes_nothing(tmp_path: Path) -> None:
    save_random("gpt2", tmp_path / "gpt2")

    with pytest.raises(RecipeError, match=r"fp8-static leaves nothing to quantize.*Conv1D"):
        planned(tmp_path / "gpt2", "fp8-static", kv_cache="fp8")


def test_a_container_that_a_recipe_names_and_nothing_writes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe nf5.*gguf-like.*bitsandbytes"):
        Recipe.parse("name: nf5\nformat: gguf-like\nrules: [{pattern: '.*', scheme: nf4}]", "nf5")
