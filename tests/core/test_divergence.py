"""The statistics of two models' distributions against their formulas in float64, and what happens when there is nothing to measure."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import quantkit.core.divergence as divergence_module
from quantkit.core.divergence import Divergence, DivergenceResult, Perplexity
from quantkit.errors import CheckpointError, UsageError

ROWS, LENGTH, VOCABULARY = 3, 40, 57


def two_models(noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator) * 2
    quantized = base + noise * torch.randn(base.shape, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    counted = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    return base, quantized, targets, counted


def measured(*arguments: torch.Tensor) -> DivergenceResult:
    divergence = Divergence()
    divergence.add(*arguments)
    return divergence.result()


def error_of_mean(values: np.ndarray) -> float:
    """llama.cpp: sqrt((mean of squares - square of mean) / (n - 1))."""
    return math.sqrt((np.mean(values**2) - np.mean(values) ** 2) / (len(values) - 1))


def test_every_statistic_equals_its_formula_in_float64() -> None:
    base, quantized, targets, counted = two_models()
    ln_p, ln_q = (t.double().log_softmax(-1)[counted].numpy() for t in (base, quantized))
    target = targets[counted].numpy()
    rows = np.arange(len(target))
    p, nll_base, nll_quant = np.exp(ln_p), -ln_p[rows, target], -ln_q[rows, target]
    kl, n = (p * (ln_p - ln_q)).sum(-1), len(target)
    delta = np.exp(-nll_quant) - np.exp(-nll_base)
    covariance = (np.mean(nll_base * nll_quant) - nll_base.mean() * nll_quant.mean()) / (n - 1)
    ln_ratio_se = math.sqrt(error_of_mean(nll_base) ** 2 + error_of_mean(nll_quant) ** 2 - 2 * covariance)
    ppl_base, ppl_quant = math.exp(nll_base.mean()), math.exp(nll_quant.mean())
    ppl_base_se, ppl_quant_se = ppl_base * error_of_mean(nll_base), ppl_quant * error_of_mean(nll_quant)
    same = (ln_p.argmax(-1) == ln_q.argmax(-1)).mean()
    rms = math.sqrt(np.mean(delta**2))

    result = measured(base, quantized, targets, counted)

    expected = {
        "ppl_baseline": ppl_base, "ppl_baseline_se": ppl_base_se, "ppl_quantized": ppl_quant, "ppl_quantized_se": ppl_quant_se,
        "ln_ppl_ratio": math.log(ppl_quant / ppl_base), "ln_ppl_ratio_se": ln_ratio_se,
        "ppl_ratio": ppl_quant / ppl_base, "ppl_ratio_se": ppl_quant / ppl_base * ln_ratio_se, "ppl_difference": ppl_quant - ppl_base,
        "ppl_difference_se": math.sqrt(ppl_base_se**2 + ppl_quant_se**2 - 2 * ppl_base * ppl_quant * covariance),
        "correlation": np.corrcoef(nll_base, nll_quant)[0, 1], "kl_mean": kl.mean(), "kl_se": error_of_mean(kl),
        "delta_p_mean": delta.mean(), "delta_p_mean_se": error_of_mean(delta), "delta_p_rms": rms,
        "delta_p_rms_se": 0.5 / rms * error_of_mean(delta**2), "top1": same, "top1_se": math.sqrt(same * (1 - same) / (n - 1)),
    }  # fmt: skip
    assert result.num_tokens == n
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=2e-5, abs=1e-6), name
    for name, fraction in (("maximum", 1), ("99.9%", 0.999), ("median", 0.5), ("10.0%", 0.1), ("minimum", 0)):
        assert result.kl_percentiles[name] == pytest.approx(np.quantile(kl, fraction), rel=1e-4, abs=1e-6)
        assert result.delta_p_percentiles[name] == pytest.approx(np.quantile(delta, fraction), rel=1e-4, abs=1e-6)


def test_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, quantized, targets, counted = two_models()
    whole = measured(base, quantized, targets, counted)
    monkeypatch.setattr(divergence_module, "_CHUNK", 3 * VOCABULARY)
    divergence = Divergence()
    for row in range(ROWS):
        divergence.add(base[row], quantized[row], targets[row], counted[row])

    assert divergence.result() == whole
    assert divergence.kl_values.dtype == torch.float32
    assert len(divergence.kl_values) == whole.num_tokens


def test_results_by_position_are_those_of_the_tokens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "_FIRST_POSITIONS", 8)
    base, quantized, targets, counted = two_models()
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)

    found = measured(base, quantized, targets, counted, positions).by_position

    assert [(each.start, each.end) for each in found] == [(0, 8), (8, 16), (16, 32), (32, 40)]
    for each in found:
        here = counted & (positions >= each.start) & (positions < each.end)
        alone = measured(base, quantized, targets, here)
        assert each.num_tokens == alone.num_tokens == int(here.sum())
        for name in ("kl_mean", "kl_se", "ppl_baseline", "ppl_quantized", "ln_ppl_ratio", "ln_ppl_ratio_se"):
            assert getattr(each, name) == pytest.approx(getattr(alone, name), rel=1e-9)
    assert json.loads(json.dumps(measured(base, quantized, targets, counted, positions).to_dict()))["by_position"][0]["start"] == 0


def test_equal_models_differ_by_exactly_nothing() -> None:
    base, _, targets, counted = two_models()

    result = measured(base, base.clone(), targets, counted)

    assert (result.kl_mean, result.kl_se, result.kl_percentiles["maximum"], result.delta_p_rms, result.delta_p_rms_se) == (0, 0, 0, 0, 0)
    assert (result.ppl_ratio, result.ppl_difference, result.top1, result.top1_se) == (1, 0, 1, 0)
    assert result.correlation == pytest.approx(1)


def test_places_that_are_not_counted_are_not_looked_at() -> None:
    base, quantized, targets, counted = two_models()
    spoiled = torch.where(counted[..., None], quantized, torch.nan)
    outside = torch.where(counted, targets, VOCABULARY + 5)

    assert measured(base, spoiled, outside, counted) == measured(base, quantized, targets, counted)


def test_perplexity_alone_equals_that_of_the_pair() -> None:
    base, quantized, targets, counted = two_models()
    pair = measured(base, quantized, targets, counted)
    perplexity = Perplexity()
    perplexity.add(quantized, targets, counted)

    result = perplexity.result()

    assert (result.num_tokens, result.ppl, result.ppl_se) == (pair.num_tokens, pair.ppl_quantized, pair.ppl_quantized_se)


def test_half_precision_logits_are_taken_in_float32() -> None:
    base, quantized, targets, counted = two_models()
    half = (base.bfloat16(), quantized.bfloat16())

    assert measured(*half, targets, counted) == measured(half[0].float(), half[1].float(), targets, counted)


def test_one_token_has_no_standard_error_and_gives_valid_json() -> None:
    base, quantized, targets, _ = two_models()
    counted = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    counted[1, 2] = True

    result = measured(base, quantized, targets, counted)

    assert math.isnan(result.kl_se)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["kl_se"] is None


def test_a_model_that_is_wrong_beyond_measure_is_a_result() -> None:
    base, _, targets, counted = two_models()

    result = measured(base, torch.zeros_like(base).scatter(-1, targets[..., None], -2000.0), targets, counted)

    assert result.ppl_quantized == math.inf
    assert result.kl_mean > 10
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("collector", [Divergence, Perplexity])
def test_nothing_counted_is_said(collector: type) -> None:
    base, _, targets, counted = two_models()
    nothing = collector()
    nothing.add(*([base] * (2 if collector is Divergence else 1)), targets, torch.zeros_like(counted))

    with pytest.raises(UsageError, match="no token was measured"):
        nothing.result()
    with pytest.raises(UsageError, match="no token was measured"):
        collector().result()


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (-math.inf, "infinite"), (math.inf, "infinite")])
@pytest.mark.parametrize("which", ["baseline", "quantized"])
def test_broken_logits_name_the_model_that_gives_them(which: str, value: float, word: str) -> None:
    base, quantized, targets, counted = two_models()
    broken = base if which == "baseline" else quantized
    row, place = counted.nonzero()[5].tolist()
    broken[row, place, 7] = value

    with pytest.raises(CheckpointError, match=f"the {which} model gives {word}"):
        Divergence().add(base, quantized, targets, counted)
