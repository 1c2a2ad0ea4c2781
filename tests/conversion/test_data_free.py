"""A conversion without data is tensor in, tensor out: no forward pass, and memory that the number of layers does not touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
