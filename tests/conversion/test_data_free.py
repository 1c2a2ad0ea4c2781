"""A conversion without data is tensor in, tensor out: no forward pass, and memory that the number of layers does not touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from tests.conversion.conftest import Launcher, edit_config, save_tiny

Options = Callable[..., ConvertOptions]


def forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was run")


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a16-mse", "w8a16"])
def test_nothing_is_run_and_no_text_is_read(recipe: str, stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    monkeypatch.setattr("quantkit.conversion.convert.BlockRunner", forbidden)
    monkeypatch.setattr("quantkit.conversion.convert.load_rows", forbidden)

    report = convert(str(stories), tmp_path / "out", options(recipe))

    assert report.divergence is None and report.calibration is None
    assert all(layer.seen_tokens is None for layer in report.layers)


def test_a_calibrated_recipe_does_run_it(stories: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.conversion.convert.BlockRunner", forbidden)

    with pytest.raises(AssertionError, match="the model was run"):
        convert(str(stories), tmp_path / "out", options())


def test_one_calibrated_layer_is_enough_to_need_data(stories: Path, tmp_path: Path, options: Options) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nrules: [{pattern: 'layers.4.*up_proj', scheme: w4a16, rounding: gptq}, {pattern: .*, scheme: w4a16, rounding: rtn}]"
    )

    report = convert(str(stories), tmp_path / "out", options(str(tmp_path / "mine.yaml")))

    assert {layer.name for layer in report.layers if layer.rounding == "GPTQ"} == {"model.layers.4.mlp.up_proj"}
    assert report.divergence is not None


def wide(folder: Path, num_layers: int) -> Path:
    """A llama with layers of 13 MB, written without building it."""
    width, inner = 512, 1408
    save_tiny(folder, hidden_size=width, intermediate_size=inner, num_hidden_layers=1, head_dim=128)
    shapes = {
        "self_attn.q_proj": (512, width), "self_attn.k_proj": (256, width), "self_attn.v_proj": (256, width), "self_attn.o_proj": (width, 512),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    outside = {"model.embed_tokens": (96, width), "lm_head": (96, width), "model.norm": (width,)}
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(num_layers) for name, shape in shapes.items()}
    names |= {f"{name}.weight": shape for name, shape in outside.items()}
    save_file({name: torch.randn(shape) for name, shape in names.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return edit_config(folder, num_hidden_layers=num_layers, layer_types=None)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, launch: Launcher) -> None:
    grown = []
    for num_layers in (2, 10):
        source = wide(tmp_path / f"{num_layers}", num_layers)
        ended = launch("convert", source, "-o", tmp_path / f"{num_layers}-out", "-r", "w4a16-rtn")
        assert ended.code == 0, ended.stderr
        grown.append(ended.grown)

    assert 0 < grown[0] < 80e6, grown
    assert grown[1] - grown[0] < 8e6, grown  # eight more layers have 104 MB


JOINED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def stored_of(out: Path, source: Path, layer: int, names: tuple[str, ...], part: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A part of each of these layers, and their weights as one."""
    tensors, originals = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    names = tuple(f"model.layers.{layer}.{name}" for name in names)
    return [tensors[f"{name}.{part}"] for name in names], torch.cat([originals[f"{name}.weight"].float() for name in names])


@pytest.mark.parametrize("names", JOINED, ids=["qkv", "gate and up"])
def test_layers_that_engines_join_share_nvfp4s_global_scale(names: tuple[str, ...], tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "tiny")

    convert(str(source), tmp_path / "out", options("nvfp4"))

    scales, joint = stored_of(tmp_path / "out", source, 1, names, "weight_global_scale")
    assert [scale.item() for scale in scales] == pytest.approx([448 * 6 / joint.abs().max().item()] * len(names), rel=1e-6)


@pytest.mark.parametrize("names", JOINED, ids=["qkv", "gate and up"])
def test_layers_that_engines_join_share_an_fp8_scale_and_codes_follow_it(names: tuple[str, ...], tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "tiny", dtype=torch.bfloat16)

    convert(str(source), tmp_path / "out", options("fp8-dynamic", overrides=(".*=fp8-tensor",)))

    scales, joint = stored_of(tmp_path / "out", source, 0, names, "weight_scale")
    codes, _ = stored_of(tmp_path / "out", source, 0, names, "weight")
    expected = (joint.abs().amax() / 448).bfloat16()
    assert all(torch.equal(scale, expected.reshape(1)) for scale in scales)
    assert torch.equal(torch.cat(codes).float(), (joint / expected.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_what_stands_alone_or_has_another_scheme_keeps_its_own_range(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "tiny")

    convert(str(source), tmp_path / "out", options("nvfp4", overrides=("q_proj=fp8-tensor",)))

    for names in (("self_attn.o_proj",), ("self_attn.k_proj", "self_attn.v_proj")):
        scales, joint = stored_of(tmp_path / "out", source, 0, names, "weight_global_scale")
        assert [scale.item() for scale in scales] == pytest.approx([448 * 6 / joint.abs().max().item()] * len(names), rel=1e-6)
    (scale,), weight = stored_of(tmp_path / "out", source, 0, ("self_attn.q_proj",), "weight_scale")
    assert torch.equal(scale, (weight.abs().amax() / 448).half().reshape(1))


def test_an_experts_gate_and_up_share_too(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "moe", family="mixtral", num_local_experts=3, num_experts_per_tok=1)
    originals = load_file(source / "model.safetensors")

    convert(str(source), tmp_path / "out", options("nvfp4"))

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    modules = sorted(name.removesuffix(".w1.weight") for name in originals if name.endswith(".w1.weight"))
    assert len(modules) == 6
    largest = [max(originals[f"{module}.{w}.weight"].abs().max().item() for w in ("w1", "w3")) for module in modules]
    for w in ("w1", "w3"):
        assert [tensors[f"{module}.{w}.weight_global_scale"].item() for module in modules] == pytest.approx([448 * 6 / top for top in largest])
