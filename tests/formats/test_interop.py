"""transformers and its libraries load what we write, and give the logits of the weights that our own decoder reads from the same files.

Where compressed-tensors dequantizes it rounds weights to the type of their scales, so ours are rounded to that first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from quantkit import ops
from quantkit.checkpoint.source import resolve
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.summary import summarize
from quantkit.runtime.loader import load
from tests.runtime.conftest import dequantized_model

REFERENCE = resolve("reference").folder
IDS = torch.arange(5, 69).view(2, 32) * 13 % 4000
INTEGERS = ["w2a16-g64", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16", "w8a16-channel"]
ASYMMETRIC = ["w4a16-asym", "w8a16-asym"]
WITH_ACTIVATIONS = ["w8a8-int8", "w4a8", "w4afp8", "fp8-dynamic", "fp8-tensor", "fp8-static", "fp8-block"]
FLOATS = ["nvfp4", "mxfp4", "mxfp8", "fp8-a16"]


def written(folder: Path, scheme: str, container: str) -> Path:
    """The reference model in one scheme; calibrated on a few rows where that has scales of inputs."""
    rows = CalibrationOptions(num_samples=8, seq_len=128)
    settings = {"recipe": "w4a16-rtn", "format": container, "overrides": (f".*={scheme}",), "calibration": rows}
    convert(str(REFERENCE), folder, ConvertOptions(measure=False, **settings))
    return folder


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model in float32 with the weights that our decoder reads, those rounded to a type first."""
    model = dequantized_model(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def theirs(folder: Path, **settings: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()


def require_equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=0)  # of logits that spread over some 3


@pytest.mark.parametrize("scheme", INTEGERS)
def test_transformers_runs_packed_integers(scheme: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", scheme, "compressed-tensors")

    require_equal(logits(theirs(folder)), logits(ours(folder)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", [*INTEGERS[2:3], *ASYMMETRIC, *WITH_ACTIVATIONS, *FLOATS])
def test_transformers_dequantizes_what_compressed_tensors_holds(scheme: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", scheme, "compressed-tensors")

    found = logits(theirs(folder, quantization_config=CompressedTensorsConfig(dequantize=True)))

    require_equal(found, logits(ours(folder, torch.bfloat16)))


def nudged(model: nn.Module, seed: int) -> Tensor:
    """Its logits where the result of every linear is off by no more than a sum in float32."""
    draws = torch.Generator().manual_seed(seed)
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    handles = [m.register_forward_hook(lambda _, __, y: y * (1 + 3e-7 * torch.randn(y.shape, generator=draws))) for m in linears]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("scheme", WITH_ACTIVATIONS)
def test_transformers_rounds_activations_as_our_runtime_does(scheme: str, tmp_path: Path) -> None:
    """Both sum in another order, so codes at a border part: the two are as near as transformers is to itself with sums moved by as much."""
    folder = written(tmp_path / "out", scheme, "compressed-tensors")
    runtime = load(str(folder), mode="exact", device=torch.device("cpu")).model
    runtime.set_attn_implementation("eager")

    model = theirs(folder)
    found, expected, unrounded = logits(model), logits(runtime), logits(ours(folder))

    assert (found - expected).abs().mean() < 2 * max((found - nudged(model, seed)).abs().mean() for seed in range(3))
    assert (found - expected).abs().mean() < 0.8 * (found - unrounded).abs().mean()


def test_transformers_fails_on_packed_zero_points_unless_it_dequantizes_as_our_table_says(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "w4a16-asym", "compressed-tensors")

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        theirs(folder)


def test_transformers_dequantizes_fp8_in_blocks(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "fp8-block", "fp8")

    require_equal(logits(theirs(folder, quantization_config=FineGrainedFP8Config(dequantize=True))), logits(ours(folder)))


@pytest.mark.parametrize("scheme", ["fp8-tensor", "fp8-static"])
@pytest.mark.parametrize("settings", [{}, {"quantization_config": FineGrainedFP8Config(dequantize=True)}], ids=["as it is", "dequantize"])
def test_transformers_misreads_fp8_with_a_scale_a_tensor_as_our_table_says(scheme: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The scales are left out, and the codes' own values become the weights."""
    folder = written(tmp_path / "out", scheme, "fp8")
    opened, expected = OpenedCheckpoint(folder), logits(ours(folder))

    model = theirs(folder, **settings)

    for name in opened.schemes:
        assert torch.equal(model.get_submodule(name).weight, opened.reader.get(f"{name}.weight").float()), name
    assert (logits(model) - expected).abs().mean() > 0.5 * expected.std()
    verdicts = {verdict.engine: verdict.loads for verdict in summarize(folder).verdicts}
    assert verdicts["transformers"] is False and verdicts["vLLM"] is True


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "nf4-b128", "fp4", "fp4-dq"])
def test_transformers_runs_tables_through_bitsandbytes(scheme: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out", scheme, "bitsandbytes")
    opened, model = OpenedCheckpoint(folder), theirs(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert linears.keys() == opened.schemes.keys() and len(linears) == 42

    for name, module in linears.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, opened.get(f"{name}.weight").to(weight.dtype)), name
    expected = logits(ours(folder))
    assert (logits(model) - expected).abs().mean() < 0.01 * expected.std()
    require_equal(logits(in_float32(theirs(folder))), expected)


def in_float32(model: nn.Module) -> nn.Module:
    """bitsandbytes' 4-bit models run in bfloat16, whatever is asked for, and repack weights where the processor has products of these."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set, module.support_avx512bf16_for_cpu = torch.float32, True, False
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_transformers_runs_rows_of_llm_int8_through_bitsandbytes(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "int8", "bitsandbytes")
    opened, model = OpenedCheckpoint(folder), theirs(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)}
    assert linears.keys() == opened.schemes.keys() and len(linears) == 42
    generator = torch.Generator().manual_seed(0)

    for name, module in linears.items():
        x = torch.randn(16, module.in_features, generator=generator).half()
        x[:, 3] *= 20  # an outlier, of which 8 bits would take the rest's place
        run = ops.quantized_linear(opened.quantized(name), opened.schemes[name], "exact")
        expected = run(x.float())
        with torch.no_grad():
            found = module(x).float()
        assert (found - expected).abs().max() < 0.01 * expected.std(), name  # it computes in float16
    expected, found = logits(ours(folder)), logits(model)
    assert (found - expected).abs().mean() < 0.02 * expected.std()
