"""An expert that no token reaches: reported by name, never NaN, and calibrated all the same where every expert is shown every token."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.cli import main
from quantkit.conversion.convert import convert
from quantkit.conversion.coverage import coverage
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.report import LayerResult
from quantkit.errors import UsageError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ
from tests.conversion.conftest import edit_tensors, save_tiny

Options = Callable[..., ConvertOptions]
MOE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 64,
       "decoder_sparse_step": 1}  # fmt: skip
UNREACHED = 4
ROWS, LENGTH = 4, 64
"""Of the calibration part of the rows, see conftest."""


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Five experts of which the last one's score is always 0, and those of two others above it."""
    folder = save_tiny(tmp_path / "moe", family=request.param, **MOE)

    def never(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".gate.weight")]:
            first, second = tensors[name][0].clone(), tensors[name][2].clone()
            tensors[name].copy_(torch.stack([first, -first, second, -second, torch.zeros_like(first)]))

    return edit_tensors(folder, never)


def first_mixture(folder: Path, tokens: Path) -> tuple[str, Tensor, Tensor]:
    """By transformers alone: the first mixture's name in the file, its input [tokens, H] and the tokens sent to each of its experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    with torch.no_grad():
        scores = model(load_file(tokens)["input_ids"][:ROWS], output_router_logits=True, use_cache=False).router_logits[0]
    handle.remove()
    counts = torch.bincount(scores.topk(2, dim=-1).indices.flatten(), minlength=5)
    name = next(name for name in OpenedCheckpoint(folder).names if ".layers.0." in name and name.endswith(".gate.weight"))
    return name.removesuffix(".gate.weight"), given[0], counts


def test_an_unreached_expert_is_named_and_rounded_without_data(mixture: Path, tmp_path: Path, options: Options, tokens: Path) -> None:
    report = convert(str(mixture), tmp_path / "out", options())

    name, _, counts = first_mixture(mixture, tokens)
    assert report.experts is not None and not report.experts["saw_all"]
    first = report.experts["layers"][0]
    assert (first["layer"], first["num_experts"], first["minimum"], first["maximum"]) == (name, 5, 0, int(counts.max()))
    assert first["median"] == median(counts.tolist()) and counts[UNREACHED] == 0
    named = [each for layer in report.experts["layers"] for each in layer["below"]]
    assert f"{name}.experts.{UNREACHED}" in named and named[0] in report.experts["summary"] and "fewer than 32" in report.experts["summary"]
    layers = [layer for layer in report.layers if f".experts.{UNREACHED}." in layer.name]
    assert len(layers) == 6 and all(layer.seen_tokens is None and layer.rounding == "SearchedScales" and layer.note for layer in layers)
    opened = OpenedCheckpoint(tmp_path / "out")
    assert all(bool(torch.isfinite(opened.get(each).float()).all()) for each in opened.names)
    assert report.divergence is not None and report.divergence["kl_mean"] >= 0


def test_with_the_flag_every_expert_is_calibrated_on_every_token(mixture: Path, tmp_path: Path, options: Options, tokens: Path) -> None:
    report = convert(str(mixture), tmp_path / "out", options(moe_calibrate_all_experts=True))

    name, x, counts = first_mixture(mixture, tokens)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 5 * 3 and {(layer.seen_tokens, layer.rounding) for layer in experts} == {(ROWS * LENGTH, "GPTQ")}
    routed = {(layer.name.removeprefix(f"{name}.experts.")[0], layer.routed_tokens) for layer in experts if layer.name.startswith(name)}
    assert routed == {(str(number), count) for number, count in enumerate(counts.tolist())}
    assert report.experts is not None and report.experts["saw_all"] and "all were calibrated on every token" in report.experts["summary"]
    assert f"{name}.experts.{UNREACHED}" in report.experts["layers"][0]["below"], "what its router never picks is still said"

    before, after = OpenedCheckpoint(mixture), OpenedCheckpoint(tmp_path / "out")
    statistics = Statistics(x.T @ x / len(x), len(x))
    for linear in [layer.name for layer in experts if layer.name.startswith(f"{name}.experts.{UNREACHED}.")][:2]:
        weight, spec = before.get(f"{linear}.weight"), after.schemes[linear].weight
        assert spec is not None and weight.shape[1] == x.shape[1]
        ours = GPTQ()(weight, spec, torch.float16, statistics).dequantize()
        assert (after.get(f"{linear}.weight") == ours).float().mean() > 0.99, "a sum in another order may turn a code over"


def test_what_blocks_hand_on_is_the_same_with_the_flag(mixture: Path, tmp_path: Path, options: Options) -> None:
    wanted = partial(options, ignore=(r"layers\.0\.", r"layers\.1\..*experts"), overrides=())

    usual = convert(str(mixture), tmp_path / "usual", wanted())
    shown = convert(str(mixture), tmp_path / "shown", wanted(moe_calibrate_all_experts=True))

    assert [(layer.name, layer.error) for layer in usual.layers] == [(layer.name, layer.error) for layer in shown.layers] and len(usual.layers) == 4
    assert usual.divergence == shown.divergence
    one, other = OpenedCheckpoint(tmp_path / "usual"), OpenedCheckpoint(tmp_path / "shown")
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.names)


@pytest.mark.parametrize("recipe", ["w4a16-awq-gptq", "w2a16-tuned", "fp8-static"])
def test_transforms_and_tuning_take_experts_that_saw_everything(recipe: str, mixture: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(mixture), tmp_path / "out", options(recipe, moe_calibrate_all_experts=True))

    opened = OpenedCheckpoint(tmp_path / "out")
    assert all(bool(torch.isfinite(opened.get(each).float()).all()) for each in opened.names)
    assert {layer.seen_tokens for layer in report.layers} == {ROWS * LENGTH}
    assert report.divergence is not None and 0 <= report.divergence["kl_mean"] < 1


def test_a_recipe_asks_for_it_and_the_command_line_decides(mixture: Path, tiny: Path, options: Options) -> None:
    assert Recipe.load("w4a16-mixed-moe").moe_calibrate_all_experts and not Recipe.load("w4a16-gptq").moe_calibrate_all_experts

    wanted = partial(options, "w4a16-mixed-moe", target_bpw=5.0)
    asked = {given: plan_conversion(str(mixture), wanted(moe_calibrate_all_experts=given)) for given in (None, True, False)}

    assert [prepared.plan.calibrates_all_experts for prepared in asked.values()] == [True, True, False]
    assert "moe_calibrate_all_experts: false" in asked[False].recipe.to_yaml()
    assert not plan_conversion(str(tiny), wanted()).plan.calibrates_all_experts, "no mistake of the recipe's"
    with pytest.raises(UsageError, match=r"tiny cannot show all experts every token: it has no experts .* leave --moe-calibrate-all-experts out"):
        plan_conversion(str(tiny), options(moe_calibrate_all_experts=True))


def test_the_terminal_and_the_file_say_whom_data_reached(mixture: Path, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--calib", str(tokens), "--num-samples", "4", "--no-measure"]
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(mixture), "-o", str(tmp_path / "out"), "--moe-calibrate-all-experts", *data])

    written = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())["experts"]
    shown = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code and written["threshold"] == 32 and written["layers"][1]["minimum"] == 0
    assert written["summary"].split(" fewer")[0] in shown and f"experts.{UNREACHED}" in shown


def test_coverage_goes_by_expert_and_leaves_out_what_is_none() -> None:
    counts = {"l.0.experts.0": 5, "l.0.experts.1": 100, "l.0.experts.2": 31, "l.1.experts.0": 32, "l.1.experts.1": 64, "l.1.experts.2": 96}
    layers = [LayerResult(f"{expert}.{kind}", "w4a16", "GPTQ", 0.1, routed_tokens=n) for expert, n in counts.items() for kind in ("up", "down")]

    found = coverage([*layers, LayerResult("l.0.q_proj", "w4a16", "GPTQ", 0.1)], saw_all=False)

    assert found is not None
    assert [(each.layer, each.minimum, each.median, each.maximum) for each in found.layers] == [("l.0", 5, 31, 100), ("l.1", 32, 64, 96)]
    assert found.below == ["l.0.experts.0", "l.0.experts.2"]
    assert coverage([LayerResult("l.0.experts.0.up", "w8a16", "SearchedScales", 0.1)], saw_all=False) is None


def test_clipping_names_an_expert_that_nothing_reached_and_searches_its_scales(mixture: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(mixture), tmp_path / "out", options("w4a16-awq", group_size=16))

    layers = [layer for layer in report.layers if f".experts.{UNREACHED}." in layer.name]
    assert len(layers) == 6 and all(layer.rounding == "SearchedScales" and "too few calibration tokens" in (layer.note or "") for layer in layers)
    assert any("could not be folded" in note for note in report.notes)


def test_experts_of_a_layer_fall_to_one_group_that_engines_load(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "moe", family="mixtral", **MOE | {"hidden_size": 64, "intermediate_size": 128})

    plan = plan_conversion(str(source), ConvertOptions(recipe="w4a16-rtn", target_engines=("vllm",))).plan

    experts = {layer.scheme.name for name, layer in plan.layers.items() if ".experts." in name}
    assert experts == {"w4a16-g64"}
    assert {plan.layers[name].note is not None for name in plan.layers if ".experts." in name} == {True}
