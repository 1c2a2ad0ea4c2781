"""Every scheme of the shipped recipes in every container that holds it, and every peer's checkpoint, runs: greedy tokens are those of transformers.

Its model has the weights that a checkpoint stands for. Where inputs are rounded too, its linears round theirs by the formulas written here; values at
the border of two codes fall to the other one now and then, so those are compared by KL divergence, and tokens up to where the best two lie near.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.recipe import Recipe, list_recipes
from quantkit.core.divergence import Divergence
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import CONTAINERS, get_format
from quantkit.runtime.loader import load
from tests.runtime.conftest import dequantized_model, greedy_of, sway_of
from tests.runtime.test_engine import IS_FULL, NUM_PROMPTS, engine, expect, greedy
from tests.runtime.test_w8a8 import first_difference

SHAPES = [(256, 256), (128, 256), (768, 256), (256, 768)]
"""Of the reference model's linears."""
QUICK_AWQ = """
name: quick-awq
rules: [{pattern: .*, scheme: w4a16-asym, rounding: rtn, transforms: [{name: awq, grid: 2, polish: 0, rows: 64}]}]
"""
Rounded = Callable[[Tensor], Tensor]


def schemes_of(recipe: Recipe) -> set[str]:
    candidates = recipe.allocate.candidates if recipe.allocate is not None else ()
    return {rule.scheme for rule in recipe.rules} | {name for rule in recipe.rules for name in rule.candidates or ()} | set(candidates or ())


MORE = {"nf4-dq", "fp4-dq", "nf4-b128", "mxfp8", "fp8-tensor", "w4afp8"}
"""Which no recipe names."""
SCHEMES = sorted(MORE.union(*map(schemes_of, list_recipes())))
CASES = [
    (scheme, container)
    for scheme in SCHEMES
    for container in CONTAINERS
    if all(get_format(container, [parse_scheme(scheme)]).why_not(parse_scheme(scheme), shape) is None for shape in SHAPES)
]
PLAIN = [case for case in CASES if parse_scheme(case[0]).activation is None]
ROUNDING = [case for case in CASES if parse_scheme(case[0]).activation is not None]
PEERS = [
    "gptq_b4_g128", "gptq_b4_g64_desc", "gptq_b3_g128", "gptq_b8_g128", "ct_w4a16_gptq", "ct_w4a16_asym_awq", "ct_nvfp4a16", "awq_gemm_autoawq",
    "bnb_nf4_dq",
]  # fmt: skip
ROUNDING_PEERS = ["ct_w8a8_gptq", "ct_fp8_block", "ct_fp8_dynamic", "bnb_int8", "hf_finegrained_fp8_handmade"]


def written(reference: Path, folder: Path, scheme: str, container: str) -> Path:
    calibration = CalibrationOptions(num_samples=4, seq_len=64)  # for input scales that are stored
    options = ConvertOptions(recipe="w4a16-rtn", format=container, overrides=(f".*={scheme}",), measure=False, calibration=calibration)
    convert(str(reference), folder, options)
    return folder


def test_every_shipped_scheme_and_every_container_is_run() -> None:
    assert {scheme for scheme, _ in CASES} == set(SCHEMES) and {container for _, container in CASES} == set(CONTAINERS)


def test_every_checkpoint_of_others_is_run(peers: Path) -> None:
    quantized = {folder.name for folder in peers.iterdir() if (folder / "config.json").exists() and OpenedCheckpoint(folder).schemes}

    assert quantized == {*PEERS, *ROUNDING_PEERS}


@pytest.mark.parametrize(("scheme", "container"), PLAIN)
def test_every_scheme_of_weights_says_what_its_weights_say(
    scheme: str, container: str, reference: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    expect(written(reference, tmp_path / "out", scheme, container), prompts[: NUM_PROMPTS if IS_FULL else 4], 8)


def test_a_rotated_checkpoint_runs_with_its_head_of_its_own(reference: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    convert(str(reference), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn", rotation="hadamard", measure=False))

    expect(tmp_path / "out", prompts[: NUM_PROMPTS if IS_FULL else 4], 8)


@pytest.mark.parametrize("recipe", ["quick-awq", "w4a16-gptq", "w4a16-mixed-gptq"])
def test_calibrated_checkpoints_run_too(recipe: str, reference: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    if recipe == "quick-awq":
        recipe = str(tmp_path / "quick-awq.yaml")
        Path(recipe).write_text(QUICK_AWQ)
    calibration = CalibrationOptions(num_samples=4, seq_len=64)
    convert(str(reference), tmp_path / "out", ConvertOptions(recipe=recipe, calibration=calibration, measure=False))

    expect(tmp_path / "out", prompts[:4], 8)


@pytest.mark.parametrize("name", PEERS)
def test_checkpoints_of_others_say_what_their_weights_say(name: str, peers: Path) -> None:
    expect(peers / name, prompts_of_peers(), 10)


def prompts_of_peers() -> list[list[int]]:
    lengths = [4 + 7 * i % 60 for i in range(64)] if IS_FULL else [4, 13, 22, 31]
    return [[(11 * i + row) % 4000 + 5 for i in range(length)] for row, length in enumerate(lengths)]


@pytest.mark.parametrize(("scheme", "container"), ROUNDING)
def test_every_scheme_of_rounded_inputs_says_what_transformers_says_with_rounded_inputs(
    scheme: str, container: str, reference: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    expect_rounded(written(reference, tmp_path / "out", scheme, container), prompts[: NUM_PROMPTS if IS_FULL else 6])


@pytest.mark.parametrize("name", ROUNDING_PEERS)
def test_checkpoints_of_others_with_rounded_inputs_say_what_transformers_says_with_rounded_inputs(name: str, peers: Path) -> None:
    expect_rounded(peers / name, prompts_of_peers())


def expect_rounded(folder: Path, prompts: list[list[int]]) -> None:
    """Distributions as near the oracle's as its own sway is, far nearer than those without rounding; and its tokens, up to the first within it."""
    model, unrounded = oracle(folder), dequantized_model(folder)
    ours = load(str(folder), mode="exact", device=torch.device("cpu")).model
    ours.set_attn_implementation("eager")
    near, far = Divergence(), Divergence()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found, expected, plain = (m(input_ids=ids).logits[0, :-1] for m in (ours, model, unrounded))
        for divergence, other in ((near, expected), (far, plain)):
            divergence.add(other, found, ids[0, 1:], torch.ones(len(prompt) - 1, dtype=torch.bool))
    kl, without, sway = near.result().kl_mean, far.result().kl_mean, sway_of(model, RoundingLinear, prompts)
    assert kl < 2 * sway.kl and kl < 0.6 * without and near.result().top1 > 0.98
    tokens, wanted = greedy(engine(folder), prompts, 8), [greedy_of(model, prompt, 8) for prompt in prompts]
    apart = [margin for mine, its in zip(tokens, wanted, strict=True) if (margin := first_difference(mine, its)) is not None]
    assert len(apart) <= len(prompts) // 3 + 1 and all(margin < 2 * sway.logit for margin in apart), apart


class RoundingLinear(nn.Module):
    """transformers' linear behind the rounding of its input."""

    def __init__(self, linear: nn.Linear, rounded: Rounded) -> None:
        super().__init__()
        self.linear, self.rounded = linear, rounded

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rounded(x))


def oracle(folder: Path) -> nn.Module:
    opened, model = OpenedCheckpoint(folder), dequantized_model(folder)
    for name, scheme in opened.schemes.items():
        static = opened.reader.get(f"{name}.input_scale").float() if f"{name}.input_scale" in opened.reader.names else None
        model.set_submodule(name, RoundingLinear(model.get_submodule(name), rounding_of(scheme.name, static)))
    return model


def rounding_of(scheme: str, static: Tensor | None) -> Rounded:
    if scheme == "int8":
        return llm_int8
    if scheme.startswith("fp8") and static is not None:
        return lambda x: float8(x, static)
    if scheme == "fp8-block":
        return lambda x: float8(x, x.unflatten(-1, (-1, 128)).abs().amax(-1).repeat_interleave(128, -1) / 448)
    if scheme.startswith("fp8") or "afp8" in scheme:
        return lambda x: float8(x, x.abs().amax(-1, keepdim=True) / 448)
    return lambda x: whole(x, x.abs().amax(-1, keepdim=True) / 127.5)


def float8(x: Tensor, step: Tensor) -> Tensor:
    step = step.clamp(min=1e-12)
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def whole(x: Tensor, step: Tensor) -> Tensor:
    step = step.clamp(min=1e-12)
    return (x / step).round().clamp(-128, 127) * step


def llm_int8(x: Tensor) -> Tensor:
    """Of a token all but what reaches 6, 127 steps up to the largest of these."""
    kept = x.abs() >= 6
    others = torch.where(kept, 0, x)
    return torch.where(kept, x, whole(others, others.abs().amax(-1, keepdim=True) / 127))
