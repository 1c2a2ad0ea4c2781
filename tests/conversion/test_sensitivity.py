"""A layer's measured sensitivity is the formula's value on the whole model's own gradients, and foretells the KL of rounding that layer alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit.conversion.calibration.data import CalibrationReport, CalibrationSet
from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import Prepared, plan_conversion
from quantkit.conversion.sensitivity import Losses, SensitivityPass
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.streamed import FileOrder
from quantkit.methods.registry import get_rounding
from quantkit.models.streaming import BlockRunner
from tests.conversion.conftest import save_tiny

SCHEMES = ("w2a16-channel", "w4a16-channel")


def rows_of(count: int, length: int, vocabulary: int, seed: int = 0) -> CalibrationSet:
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return whole(ids)


def whole(ids: torch.Tensor) -> CalibrationSet:
    count, length = ids.shape
    report = CalibrationReport("test", count, ids.numel(), count, length)
    return CalibrationSet(ids, torch.arange(length).expand(count, length).contiguous(), torch.ones(count, length, dtype=torch.bool), report)


def measured(source: Path, rows: CalibrationSet, folder: Path) -> tuple[Losses, Prepared]:
    prepared = plan_conversion(str(source), ConvertOptions(recipe="w4a16-rtn", format="gptq"))
    layers = prepared.plan.layers.items()
    candidates = {name: [LayerPlan(layer.linear, parse_scheme(scheme), get_rounding("rtn")) for scheme in SCHEMES] for name, layer in layers}
    runner = BlockRunner(prepared.architecture)
    weights = FileOrder(prepared.source, prepared.architecture)
    return SensitivityPass(runner, weights, rows, candidates, torch.float16, folder, lambda text: None).run(seed=3), prepared


def change(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """What rounding to nearest, by its definition, changes in [N, K] with one scale a row."""
    bits = int(scheme[1])
    half = 1 << (bits - 1)
    scale = (weight.abs().amax(1, keepdim=True) * 2 / (2 * half - 1)).half().float()
    return torch.clamp(torch.round(weight / scale), -half, half - 1) * scale - weight


SIZES = {"llama": {}, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "gpt_neox": {"max_position_embeddings": 128}}


@pytest.mark.parametrize("family", SIZES)
def test_losses_are_the_formula_s_on_the_gradients_of_the_whole_model(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", family=family, **SIZES[family])
    rows = rows_of(3, 20, 96)

    losses, prepared = measured(source, rows, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name, module in linears.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    log_p = model(rows.input_ids, use_cache=False).logits.log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=torch.Generator().manual_seed(3)).view(3, 20, 1)
    score = log_p.gather(-1, drawn)[:, :-1].sum()
    for name, layer in prepared.plan.layers.items():
        x, y = seen[layer.linear.path]
        gradient = torch.autograd.grad(score, y, retain_graph=True)[0]
        weight = linears[layer.linear.path].weight.detach()
        weight = weight.T if layer.linear.is_transposed else weight
        for scheme in SCHEMES:
            moved = x.detach().numpy() @ change(weight.contiguous(), scheme).numpy().T
            expected = np.square((gradient.numpy() * moved).sum(-1)).sum() / 2 / (3 * 19)
            assert losses[name][scheme] == pytest.approx(expected, rel=2e-3), (name, scheme)


def test_losses_foretell_the_kl_of_rounding_one_layer_of_a_trained_model(stories: Path, test_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = (test_data / "data" / "tinystories" / "sample_b.txt").read_text(encoding="utf-8")[:60_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(stories)(text).input_ids[: 16 * 256]).view(16, 256)

    losses, prepared = measured(stories, whole(ids), tmp_path)

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    with torch.no_grad():
        base = model(ids, use_cache=False).logits.log_softmax(-1)
        direct = {}
        for name in prepared.plan.layers:
            weight = model.get_submodule(name).weight
            kept = weight.data.clone()
            weight.data = weight.data + change(weight.data, "w4a16-channel")
            found = model(ids, use_cache=False).logits.log_softmax(-1)
            direct[name] = float((base.exp() * (base - found)).sum(-1)[:, :-1].mean())
            weight.data = kept
    logs = np.log([[losses[name]["w4a16-channel"], direct[name]] for name in direct])
    assert np.corrcoef(logs.T)[0, 1] > 0.9
    assert abs((logs[:, 0] - logs[:, 1]).mean()) < np.log(1.5)
