"""Calibrated scales of inputs: the largest magnitude over 448, shared as engines share them, never nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.conversion.convert import convert
from quantkit.conversion.input_scales import input_scales, peaks_of
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import CalibrationError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.methods.base import Statistics
from tests.conversion.conftest import edit_tensors, save_tiny

Options = Callable[..., ConvertOptions]


def seen_by_transformers(folder: Path, tokens: Path) -> dict[str, float]:
    """The largest magnitude at the input of every linear of the first block, whose inputs no quantization has touched, on the calibration rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers.0." in name:
            module.register_forward_pre_hook(lambda _, inputs, name=name: largest.update({name: float(inputs[0].abs().max())}))
    with torch.no_grad():
        model(load_file(tokens)["input_ids"][:4], use_cache=False)
    return largest


@pytest.mark.parametrize(("container", "dtype"), [("compressed-tensors", torch.float16), ("fp8", torch.float32)])
@pytest.mark.parametrize("rounding", ["rtn", "mse", "gptq"])
def test_scales_are_those_of_what_transformers_computes(
    rounding: str, container: str, dtype: torch.dtype, stories: Path, tokens: Path, tmp_path: Path, options: Options
) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\nrules: [{{pattern: .*, scheme: fp8-static, rounding: {rounding}}}]")

    convert(str(stories), tmp_path / "out", options(str(tmp_path / "mine.yaml"), format=container))

    scales, expected = OpenedCheckpoint(tmp_path / "out").static_scales(), seen_by_transformers(stories, tokens)
    assert len(expected) == 7 and len(scales) == 35
    for name, largest in expected.items():
        assert scales[name].dtype == dtype and scales[name].item() == pytest.approx(largest / 448, rel=1e-3)
    for layer in range(5):
        for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({scales[f"model.layers.{layer}.{name}"].item() for name in joined}) == 1
            shared = [OpenedCheckpoint(tmp_path / "out").quantized(f"model.layers.{layer}.{name}").scale.item() for name in joined]
            assert len(set(shared)) == 1
    assert verify(tmp_path / "out", options=VerifyOptions(num_tokens=0)).ok


def test_one_override_is_enough_to_calibrate_and_per_channel_weights_take_them_too(stories: Path, tmp_path: Path, options: Options) -> None:
    report = convert(str(stories), tmp_path / "out", options("w4a16-rtn", overrides=("down_proj=fp8-channel-static",)))

    assert report.calibration is not None and report.divergence is not None
    scales = OpenedCheckpoint(tmp_path / "out").static_scales()
    assert len(scales) == 5 and all(scale > 0 and scale.isfinite() for scale in scales.values())


def test_measured_divergence_knows_of_them(stories: Path, tmp_path: Path, options: Options) -> None:
    narrow = convert(str(stories), tmp_path / "static", options("fp8-static"))
    weights_alone = convert(str(stories), tmp_path / "weights", options("w4a16-gptq", overrides=(".*=fp8-tensor-a16",)))

    assert narrow.divergence["kl_mean"] > 1.2 * weights_alone.divergence["kl_mean"]


def mixture(folder: Path) -> Path:
    """Routers that send every token to the experts 0 and 1 of 3."""
    source = save_tiny(folder, family="mixtral", num_local_experts=3, num_experts_per_tok=2)

    def close(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor.fill_(1)
            if name.endswith(".gate.weight"):
                tensor.zero_()

    return edit_tensors(source, close)


def test_an_expert_that_no_token_reached_takes_its_siblings_scale_and_says_so(tmp_path: Path, options: Options) -> None:
    report = convert(str(mixture(tmp_path / "moe")), tmp_path / "out", options("fp8-static"))

    scales = OpenedCheckpoint(tmp_path / "out").static_scales()
    unreached = {layer.name for layer in report.layers if layer.note and "siblings" in layer.note}
    assert {name.split(".")[5] for name in unreached} == {"2"} and len(unreached) == 6
    for layer in range(2):
        of = f"model.layers.{layer}.block_sparse_moe.experts"
        assert len({scales[f"{of}.{expert}.{w}"].item() for expert in range(3) for w in ("w1", "w3")}) == 1
        assert len({scales[f"{of}.{expert}.w2"].item() for expert in range(3)}) == 1
    assert all(scale > 0 and scale.isfinite() for scale in scales.values()) and report.divergence["kl_mean"] < 1


def test_weights_of_an_expert_that_no_token_reached_share_their_range_too(tmp_path: Path, options: Options) -> None:
    source = mixture(tmp_path / "moe")
    (tmp_path / "mine.yaml").write_text("name: mine\nrules: [{pattern: .*, scheme: nvfp4, rounding: gptq}]")

    convert(str(source), tmp_path / "out", options(str(tmp_path / "mine.yaml")))

    originals, tensors = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for expert in range(3):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{w}" for w in ("w1", "w3")]
        largest = max(originals[f"{name}.weight"].abs().max().item() for name in names)
        assert [tensors[f"{name}.weight_global_scale"].item() for name in names] == pytest.approx([448 * 6 / largest] * 2)


def test_an_input_that_is_always_zero_is_named_with_what_works(tiny: Path, tmp_path: Path, options: Options) -> None:
    edit_tensors(tiny, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
    message = r"other than zero, so fp8-static has no scale .*--override 'model.layers.1.mlp.down_proj\$=fp8-dynamic'"

    with pytest.raises(CalibrationError, match=message):
        convert(str(tiny), tmp_path / "out", options("fp8-static"))

    convert(str(tiny), tmp_path / "out", options("fp8-static", overrides=("layers.1.mlp.down_proj$=fp8-dynamic",), fresh=True))
    assert len(OpenedCheckpoint(tmp_path / "out").static_scales()) == 13


class Layer:
    """As much of a planned layer as scales depend on."""

    def __init__(self, name: str, scheme: str = "fp8-static") -> None:
        self.linear, self.scheme, self.name = self, parse_scheme(scheme), name


def test_inputs_that_are_no_numbers_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match=r"a\.q_proj is infinite or NaN"):
            input_scales([Layer("a.q_proj"), Layer("a.k_proj")], {"a.q_proj": 1.0, "a.k_proj": bad}, torch.float16)


def test_layers_that_are_joined_but_read_unlike_inputs_take_the_largest() -> None:
    layers = [Layer("a.q_proj"), Layer("a.k_proj"), Layer("a.v_proj", "w4a16"), Layer("a.o_proj")]

    scales, notes = input_scales(layers, {"a.q_proj": 4.48, "a.k_proj": 44.8, "a.v_proj": 448.0, "a.o_proj": 2.24}, torch.float32)

    assert {name: round(scale.item(), 6) for name, scale in scales.items()} == {"a.q_proj": 0.1, "a.k_proj": 0.1, "a.o_proj": 0.005}
    assert not notes


def test_inputs_divided_by_a_transform_are_as_large_as_they_are_then() -> None:
    statistics = Statistics(torch.eye(3), 40, torch.ones(3), torch.tensor([8.0, 2.0, 3.0])).divided(torch.tensor([4.0, 1.0, 1.0]))

    assert peaks_of([(["q", "k"], statistics), (["unseen"], None)]) == {"q": 3.0, "k": 3.0}
