"""Prompts, and what transformers itself generates from the weights that a checkpoint stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.source import resolve
from quantkit.core.divergence import Divergence
from quantkit.formats.opened import OpenedCheckpoint

NEAR_TIE = 1e-4


@dataclass(frozen=True, slots=True)
class Expected:
    """Greedy tokens, and for each how far the best logit lay before the second."""

    tokens: list[int]
    margins: list[float]

    def allows(self, tokens: list[int]) -> bool:
        """Whether the tokens are these, up to the first place where the two best lay within NEAR_TIE."""
        for mine, theirs, margin in zip(tokens, self.tokens, self.margins, strict=True):
            if mine != theirs:
                return margin < NEAR_TIE
        return True


Greedy = Callable[[list[list[int]], int], list[Expected]]


def greedy_by_transformers(folder: Path) -> Greedy:
    model = dequantized_model(folder)

    def generate(prompts: list[list[int]], count: int) -> list[Expected]:
        return [greedy_of(model, prompt, count) for prompt in prompts]

    return generate


def dequantized_model(folder: Path) -> torch.nn.Module:
    """transformers' model with every weight dequantized in float32."""
    opened = OpenedCheckpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if opened.format is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        missing, unexpected = model.load_state_dict({name: opened.get(name).float() for name in opened.names}, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.tie_weights()
    return model


@torch.no_grad()
def greedy_of(model: torch.nn.Module, prompt: list[int], count: int) -> Expected:
    tokens, margins, cache, fed = [], [], None, torch.tensor([prompt])
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # renamed in transformers 5.24
    for _ in range(count):
        out = model(input_ids=fed, use_cache=True, **{name: cache})
        best = out.logits[0, -1].float().topk(2)
        cache, fed = getattr(out, name), best.indices[None, :1]
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Expected(tokens, margins)


@pytest.fixture(scope="session")
def reference() -> Path:
    return resolve("reference").folder


@pytest.fixture(scope="session")
def prompts(reference: Path) -> list[list[int]]:
    """Beginnings of real texts in the reference model's tokens, 3 to 90 tokens long."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference)
    rows = (reference.parent / "splits" / "prose.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    return [tokenizer(json.loads(row)["text"])["input_ids"][: 3 + (i * 37) % 88] for i, row in enumerate(rows)]


@dataclass(frozen=True, slots=True)
class Sway:
    """How far a model with rounded inputs moves when its products are no further off than float32's are: codes fall to the other side then."""

    kl: float
    logit: float


@torch.no_grad()
def sway_of(model: torch.nn.Module, linear: type[torch.nn.Module], prompts: list[list[int]]) -> Sway:
    """The larger of two kinds: inputs moved at random by as much, three draws; and the products in float64. `linear` is the modules that round."""
    rounding = [module for module in model.modules() if isinstance(module, linear)]
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    still, kl, logit = [model(input_ids=torch.tensor([prompt])).logits[0, :-1] for prompt in prompts], 0.0, 0.0
    for seed in range(4):
        draws, swayed = torch.Generator().manual_seed(seed), Divergence()
        if seed == 0:
            handles = [module.register_forward_hook(_wide) for module in linears]
        else:
            handles = [module.register_forward_pre_hook(partial(_nudged, draws)) for module in rounding]
        for prompt, before in zip(prompts, still, strict=True):
            ids = torch.tensor([prompt])
            after = model(input_ids=ids).logits[0, :-1]
            swayed.add(before, after, ids[0, 1:], torch.ones(len(prompt) - 1, dtype=torch.bool))
            logit = max(logit, float((after - before).abs().max()))
        for handle in handles:
            handle.remove()
        kl = max(kl, swayed.result().kl_mean)
    return Sway(kl, logit)


def _nudged(draws: torch.Generator, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0] * (1 + 3e-7 * torch.randn(inputs[0].shape, generator=draws)), *inputs[1:])


def _wide(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    product = inputs[0].double() @ module.weight.double().T
    return (product if module.bias is None else product + module.bias.double()).to(output.dtype)
