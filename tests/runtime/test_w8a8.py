"""Eight-bit weights and activations against an oracle: transformers' model whose linears round their own input, one scale a token.

Each linear alone is held to the oracle's value for the same input. For the whole model equal tokens cannot be asked for throughout: both sides sum
what lies between the linears in float32 in another order, so that now and then a value at the border of two codes falls to the other one, which moves
this token's log-probabilities, and those of tokens that see it: by 0.006 in the mean and by 0.12 at most, measured on this text. So greedy tokens are
held equal up to the first place where the two best logits lie nearer than such flips reach (such cases are counted), and the distributions of real
text are compared by KL divergence and top token, as is laid down for modes that quantize activations.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.runtime.loader import load
from tests.runtime.conftest import Expected, dequantized_model, greedy_of
from tests.runtime.test_engine import engine, greedy

FLIP = 0.2
"""Logits that flipped codes can turn round."""
OURS, VLLMS = 127.5, 127.0
"""compressed-tensors divides the largest magnitude by half the codes' whole range; vLLM's kernels by the largest code."""


class RoundingLinear(nn.Module):
    """Rounds each token's input to whole numbers from -128 to 127, halves to even, and multiplies in float64."""

    def __init__(self, weight: Tensor, divisor: float) -> None:
        super().__init__()
        self.weight, self.divisor = weight.double(), divisor

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().max(dim=-1, keepdim=True).values / self.divisor
        codes = (x / step).round().clamp(-128, 127)
        return (codes.double() @ self.weight.T * step.double()).float()


@pytest.fixture(scope="module")
def checkpoint(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w8a8") / "out"
    convert(str(reference), folder, ConvertOptions(recipe="w4a16-rtn", overrides=(".*=w8a8-int8",), measure=False))
    return folder


def oracle(checkpoint: Path, divisor: float) -> nn.Module:
    opened, model = OpenedCheckpoint(checkpoint), dequantized_model(checkpoint)
    assert len(opened.schemes) == 42 and {scheme.name for scheme in opened.schemes.values()} == {"w8a8-int8"}
    for name in opened.schemes:
        assert model.get_submodule(name).bias is None
        model.set_submodule(name, RoundingLinear(opened.get(f"{name}.weight"), divisor))
    return model


def first_difference(tokens: list[int], expected: Expected) -> float | None:
    """How near the oracle's two best logits lay where the tokens part; None where they do not."""
    return next((m for mine, its, m in zip(tokens, expected.tokens, expected.margins, strict=True) if mine != its), None)


def test_each_linear_gives_the_oracles_values(checkpoint: Path) -> None:
    model, loaded = oracle(checkpoint, OURS), load(str(checkpoint), mode="exact", device=torch.device("cpu")).model
    draws = torch.Generator().manual_seed(2)
    for path, linear in model.named_modules():
        if isinstance(linear, RoundingLinear):
            x = torch.randn(9, linear.weight.shape[1], generator=draws) * torch.logspace(-3, 3, 9)[:, None]
            expected = linear(x)

            found = loaded.get_submodule(path)(x)

            size = expected.abs().amax(-1, keepdim=True)
            torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_greedy_tokens_are_the_oracles(mode: str, checkpoint: Path, prompts: list[list[int]]) -> None:
    model = oracle(checkpoint, OURS)
    expected = [greedy_of(model, prompt, 20) for prompt in prompts[:12]]

    found = greedy(engine(checkpoint, mode=mode), prompts[:12], 20)

    apart = [m for tokens, e in zip(found, expected, strict=True) if (m := first_difference(tokens, e)) is not None]
    assert len(apart) <= 4 and all(margin < FLIP for margin in apart), apart


BOUNDS = {"ours": (OURS, 3e-4, 0.985), "vLLM's": (VLLMS, 1e-3, 0.98)}
"""Divisor, nats a token, and how often the top token is the same."""


@pytest.mark.parametrize("whose", BOUNDS)
def test_distributions_of_real_text_are_the_oracles(whose: str, checkpoint: Path, prompts: list[list[int]]) -> None:
    divisor, kl_bound, top1_bound = BOUNDS[whose]
    model, texts = oracle(checkpoint, divisor), prompts[12:36]
    with torch.no_grad():
        expected = [model(torch.tensor([text])).logits[0].double().log_softmax(-1) for text in texts]

    found = engine(checkpoint).generate(texts, max_tokens=1, temperature=0, prompt_logprobs=64)

    kl, top1 = [], []
    for out, rows in zip(found, expected, strict=True):
        for entry, row in zip(out.prompt_logprobs[1:], rows, strict=False):
            tokens, mine = (torch.tensor(x) for x in zip(*entry.top, strict=True))
            mine, theirs = mine.double(), row[tokens]
            kl.append(closed(theirs, mine))
            top1.append(int(row.argmax()) == int(tokens[0]))
    assert sum(kl) / len(kl) < kl_bound and sum(top1) / len(top1) >= top1_bound


def closed(p: Tensor, q: Tensor) -> float:
    """KL divergence of log-probabilities over some tokens and, as one, all the others."""
    p, q = (torch.cat([x, torch.log1p(-x.exp().sum().clamp(max=1 - 1e-9))[None]]) for x in (p, q))
    return float((p.exp() * (p - q)).sum())
