"""Transforms in a conversion: the model that is written computes the function of its source, and every layer says what became of its transform."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.core.divergence import DivergenceResult
from quantkit.errors import RecipeError
from quantkit.formats.streamed import open_streamed
from quantkit.models.compare import TokenRows, compare
from tests.conversion.conftest import edit_tensors, save_tiny

Options = Callable[..., ConvertOptions]
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
       "shared_expert_intermediate_size": 64}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}
FAMILIES = {"llama": {}, "qwen3": {}, "phi3": {}, "gemma2": {}, "mixtral": MOE, "qwen2_moe": MOE, "gpt2": GPT, "opt": {"ffn_dim": 128}}


def recipe(folder: Path, *, scheme: str = "w8a16-g32", rounding: str = "rtn", transforms: str = "[awq]", first: str = "") -> str:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\nrules: [{first}{{pattern: .*, scheme: {scheme}, rounding: {rounding}, transforms: {transforms}}}]")
    return str(path)


def divergence(source: Path, out: Path) -> DivergenceResult:
    ids = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(3))
    return compare(open_streamed(source, "a"), open_streamed(out, "b"), TokenRows.of_texts(ids, torch.arange(48).expand(4, 48), None))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_written_computes_its_source_s_function(family: str, dtype: torch.dtype, tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source", family=family, dtype=dtype, **FAMILIES[family])
    fmt = "gptq" if family == "gpt2" else "compressed-tensors"

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path), format=fmt))

    plain = convert(str(source), tmp_path / "plain", options(recipe(tmp_path, transforms="[]"), format=fmt))
    assert any(layer.transform and " into " in layer.transform for layer in report.layers)
    assert [layer.name for layer in report.layers] == [layer.name for layer in plain.layers]
    found, expected = divergence(source, tmp_path / "out"), divergence(source, tmp_path / "plain")
    assert found.kl_mean < 2 * expected.kl_mean + 2e-5


def test_norms_are_stored_folded_in_their_own_type_and_the_rest_is_untouched(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)

    convert(str(source), tmp_path / "out", options(recipe(tmp_path)))

    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")}
    assert all(after[name].dtype == torch.bfloat16 for name in changed)


def test_every_layer_says_where_its_scale_went_or_why_nowhere(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source", family="gpt2", **GPT)

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path), format="gptq"))

    words = {layer.name.removeprefix("transformer.h.0."): layer.transform for layer in report.layers[:4]}
    assert words["attn.c_attn"] == "AWQ into transformer.h.0.ln_1"
    assert words["attn.c_proj"] == "AWQ into transformer.h.0.attn.c_attn"
    assert "nowhere: it follows no norm" in words["mlp.c_proj"]
    assert json.loads((tmp_path / "out" / "quantkit_report.json").read_text())["layers"][0]["transform"] == report.layers[0].transform


def test_a_model_without_a_place_for_any_scale_is_refused_before_calibration(tmp_path: Path, options: Options) -> None:
    """OLMo 2 norms what its linears give, not what they take."""
    source = save_tiny(tmp_path / "source", family="olmo2")
    mine = recipe(tmp_path, scheme="w4a16", transforms="[smoothquant]", first="{pattern: '(o|down)_proj', scheme: w4a16, rounding: rtn}, ")
    before = sorted(tmp_path.iterdir())

    with pytest.raises(RecipeError) as refusal:
        convert(str(source), tmp_path / "out", options(mine, source=str(tmp_path / "no calibration yet.safetensors")))

    message = str(refusal.value)
    assert message.startswith("source has no place for the scales of SmoothQuant") and "q_proj and 4 more: it follows no norm with gains" in message
    assert "leave transforms out of recipe mine, or take w4a16-gptq" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_in_some_layers_is_enough_and_the_others_are_named(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source", family="olmo2")

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path)))

    words = {layer.name.rpartition(".")[2]: layer.transform for layer in report.layers if ".layers.1." in layer.name}
    assert words["down_proj"] == "AWQ into model.layers.1.mlp.up_proj"
    assert words["q_proj"].startswith("AWQ nowhere: it follows no norm")


def test_every_kind_of_block_is_looked_at_before_a_model_is_refused(tmp_path: Path, options: Options) -> None:
    """What follows GELU has no place, and in the first block nothing else asks for one."""
    source = save_tiny(tmp_path / "source", family="gpt2", **GPT)
    first = r"{pattern: 'h\.0\.(attn|mlp\.c_fc)', scheme: w8a16-g32, rounding: rtn}, "
    second = r"{pattern: 'h\.1\.(attn|mlp\.c_fc)', scheme: w8a16-g32, rounding: rtn}, "

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path, first=first), format="gptq"))

    assert "AWQ into transformer.h.1.ln_1" in {layer.transform for layer in report.layers}
    with pytest.raises(RecipeError, match=r"AWQ, whatever the calibration: transformer\.h\.0\.mlp\.c_proj: it follows no norm"):
        convert(str(source), tmp_path / "none", options(recipe(tmp_path, first=first + second), format="gptq"))


def test_smoothing_folds_and_keeps_the_function(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source")

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path, scheme="w8a8-int8", transforms="[{name: smoothquant, alpha: 0.6}]")))

    assert {layer.transform for layer in report.layers if "down_proj" in layer.name} == {
        f"SmoothQuant into model.layers.{i}.mlp.up_proj" for i in (0, 1)
    }
    convert(str(source), tmp_path / "plain", options(recipe(tmp_path, scheme="w8a8-int8", transforms="[]")))
    assert divergence(source, tmp_path / "out").kl_mean < 2 * divergence(source, tmp_path / "plain").kl_mean + 1e-5


def test_a_linear_left_alone_follows_the_norm_it_reads(tmp_path: Path, options: Options) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    edit_tensors(source, lambda tensors: tensors["model.layers.0.input_layernorm.weight"][::8].mul_(16))
    front = "{pattern: k_proj, scheme: none}, {pattern: gate_proj, scheme: w8a16-g32, rounding: rtn}, "

    report = convert(str(source), tmp_path / "out", options(recipe(tmp_path, first=front)))

    name = "model.layers.0.self_attn.k_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name].float() for folder in (source, tmp_path / "out"))
    exponents = (after / before).nanmedian(0).values.log2()
    assert torch.equal(exponents, exponents.round()) and bool(exponents.any())  # powers of two: nothing is lost in bfloat16
    assert {layer.transform for layer in report.layers if "gate_proj" in layer.name} == {None}
    assert divergence(source, tmp_path / "out").kl_mean < 1e-3
