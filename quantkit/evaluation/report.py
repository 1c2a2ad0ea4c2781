"""Results in the words of llama.cpp's `llama-perplexity --kl-divergence`, so that two tools' outputs can be read side by side."""

from __future__ import annotations

from quantkit.core.divergence import DivergenceResult, PerplexityResult, PositionResult
from quantkit.evaluation.continuations import ContinuationResult


def perplexity_lines(result: PerplexityResult) -> list[str]:
    return [f"Final estimate: PPL = {result.ppl:.4f} +/- {result.ppl_se:.5f}"]


def divergence_lines(result: DivergenceResult, metrics: tuple[str, ...]) -> list[str]:
    """The sections that are asked for: "ppl", "kl", "top1" (with the probability of the right token), "position"."""
    lines: list[str] = []
    if "ppl" in metrics:
        lines += ["====== Perplexity statistics ======", *_perplexity(result), ""]
    if "kl" in metrics:
        lines += ["====== KL divergence statistics ======", f"Mean    KLD: {result.kl_mean:10.6f} ± {result.kl_se:10.6f}"]
        lines += [f"{_head(name)} KLD: {value:10.6f}" for name, value in result.kl_percentiles.items()] + [""]
    if "top1" in metrics:
        lines += ["====== Token probability statistics ======", *_probability(result), ""]
    if "position" in metrics and len(result.by_position) > 1:
        lines += ["====== By position in the text ======", *(_position(each) for each in result.by_position), ""]
    return lines[:-1]


def _perplexity(r: DivergenceResult) -> list[str]:
    return [
        f"Mean PPL(Q)                   : {r.ppl_quantized:10.6f} ± {r.ppl_quantized_se:10.6f}",
        f"Mean PPL(base)                : {r.ppl_baseline:10.6f} ± {r.ppl_baseline_se:10.6f}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * r.correlation:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {r.ln_ppl_ratio:10.6f} ± {r.ln_ppl_ratio_se:10.6f}",
        f"Mean PPL(Q)/PPL(base)         : {r.ppl_ratio:10.6f} ± {r.ppl_ratio_se:10.6f}",
        f"Mean PPL(Q)-PPL(base)         : {r.ppl_difference:10.6f} ± {r.ppl_difference_se:10.6f}",
    ]


def _probability(r: DivergenceResult) -> list[str]:
    return [
        f"Mean    Δp: {100 * r.delta_p_mean:6.3f} ± {100 * r.delta_p_mean_se:5.3f} %",
        *(f"{_head(name)} Δp: {100 * value:6.3f}%" for name, value in r.delta_p_percentiles.items()),
        f"RMS Δp    : {100 * r.delta_p_rms:6.3f} ± {100 * r.delta_p_rms_se:5.3f} %",
        f"Same top p: {100 * r.top1:6.3f} ± {100 * r.top1_se:5.3f} %",
    ]


def continuation_lines(result: ContinuationResult) -> list[str]:
    """How long texts of both models stay the same."""
    head = ["", "====== Greedy continuations ======", f"Mean length of equal beginnings: {result.mean_same:.1f} of {result.length} tokens"]
    return [*head, *(f"First {count:4d} tokens the same: {100 * share:6.2f}% of {result.num_prompts}" for count, share in result.agreement.items())]


def _position(r: PositionResult) -> str:
    ratio = f"ln(PPL(Q)/PPL(base)): {r.ln_ppl_ratio:10.6f} ± {r.ln_ppl_ratio_se:10.6f}"
    return f"{r.start:6d} to {r.end - 1:6d}: KLD: {r.kl_mean:10.6f} ± {r.kl_se:10.6f}  {ratio}  ({r.num_tokens} tokens)"


def _head(name: str) -> str:
    return f"{name.capitalize() if name.isalpha() else name.rjust(5)}".ljust(7)
