"""Figures in words and tables, the same in every form of the report."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.conversion.outcome import REPORT_FILE
from quantkit.evaluation.results import Comparison
from quantkit.report.check import Finding, recoveries
from quantkit.report.layers import errors_of, unaccounted, worst_layers
from quantkit.report.schema import CheckpointResult, Provenance, Report

WORST = 3
"""Layers of each checkpoint that are named."""

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heads, and rows of cells; the first column names the row."""


def overview(report: Report) -> Table:
    """A row for each checkpoint: what it is, what it weighs, what it cost, how fast it is."""
    heads = ("checkpoint", "container", "layers", "size", "of the original", "KL divergence", "same top token", "PPL ratio", "output tokens/s")
    base = report.baseline
    rows = [(base.name, base.container, "", size(base.file_bytes), "100%", "", "", "", "")]
    for each in report.checkpoints:
        text = each.text.result if each.text is not None else None
        rows.append((
            each.name, each.container, schemes(each), size(each.file_bytes), f"{each.file_bytes / max(1, base.file_bytes):.1%}",
            f"{text.kl_mean:.5f} ± {text.kl_se:.5f}" if text else "", f"{text.top1:.2%}" if text else "",
            f"{text.ppl_ratio:.4f} ± {text.ppl_ratio_se:.4f}" if text else "", _rates(each),
        ))  # fmt: skip
    return heads, rows


def answers(report: Report) -> Table:
    """A row for each checkpoint and task."""
    heads = ("checkpoint", "task", "documents", "baseline", "quantized", "difference", "recovery", "verdict")
    rows = []
    for each in report.checkpoints:
        for task, score in recoveries(each).items():
            found = score.comparison
            assert found is not None
            rows.append((
                each.name, task, f"{score.num_documents:,}", points(found.baseline), points(found.quantized),
                f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})", recovery(found), found.verdict,
            ))  # fmt: skip
    return heads, rows


def tails(report: Report) -> Table:
    """What the worst tokens lost, and how long greedy texts stay the same."""
    heads = ("checkpoint", "tokens", "median KL", "99% KL", "99.9% KL", "largest", "first 8 tokens the same", "equal beginning")
    rows = []
    for each in report.checkpoints:
        if each.text is not None:
            result, longer = each.text.result, each.text.continuations
            percentiles = result.kl_percentiles
            kept = [f"{percentiles[name]:.4f}" for name in ("median", "99.0%", "99.9%", "maximum")]
            first = "" if longer is None or 8 not in longer.agreement else f"{longer.agreement[8]:.0%}"
            same = (first, "" if longer is None else f"{longer.mean_same:.1f} of {longer.length} tokens")
            rows.append((each.name, f"{result.num_tokens:,}", *kept, *same))
    return heads, rows


def speeds(report: Report) -> Table:
    """A row for each checkpoint and number of requests."""
    heads = (
        "checkpoint", "requests at once", "output tokens/s", "the original beside it", "ratio, and of single turns", "first token", "between tokens",
        "limit by memory",
    )  # fmt: skip
    rows = []
    for each in report.checkpoints:
        for load in each.speed.loads if each.speed is not None else ():
            assert each.speed is not None
            ratio = f"{load.ratio:.2f} ({load.ratio_low:.2f} to {load.ratio_high:.2f})"
            limit = f"{each.speed.limit:,.0f} tokens/s" if load.num_requests == 1 else ""
            rates = (f"{load.output_rate:,.1f}", f"{load.baseline_rate:,.1f}")
            times = (f"{load.first_token_ms:,.0f} ms", f"{load.inter_token_ms:,.1f} ms")
            rows.append((each.name, str(load.num_requests), *rates, ratio, *times, limit))
    return heads, rows


def conversions(report: Report) -> Table:
    heads = ("checkpoint", "recipe", "bits a weight", "mean layer error", "worst layer", "time", "peak memory", "calibration")
    rows = []
    for each in report.checkpoints:
        made = each.conversion
        if made is not None and made.layers:
            worst = max(made.layers, key=lambda layer: layer.error)
            mean = sum(layer.error for layer in made.layers) / len(made.layers)
            seen = "; ".join(text for text in (made.calibration or "none", made.experts) if text)
            bits = f"{each.bits_per_weight:.3f}" if each.bits_per_weight is not None else ""
            errors = (f"{mean:.2e} of {errors_of(each)}", f"{worst.name}: {worst.error:.2e}")
            cost = (f"{made.seconds:.0f} s", size(made.peak_memory_bytes))
            rows.append((each.name, made.recipe or "none", bits, *errors, *cost, seen))
    return heads, rows


def worst(report: Report) -> Table:
    """The layers of each checkpoint that lost most."""
    heads = ("checkpoint", "layer", "scheme", "error", "calibration tokens", "")
    rows = []
    for each in report.checkpoints:
        for layer in worst_layers(each, WORST):
            seen = "" if layer.seen_tokens is None else f"{layer.seen_tokens:,}"
            rows.append((each.name, layer.name, layer.scheme, f"{layer.error:.2e}", seen, layer.note or ""))
    return heads, rows


def unknown_layers(report: Report) -> str | None:
    """Which checkpoints have no account of their layers, in one sentence."""
    names = unaccounted(report)
    if not names:
        return None
    return f"Nothing is known of the layers of {', '.join(names)}: no {REPORT_FILE} beside the weights says what quantizing them lost."


def findings_table(findings: Sequence[Finding]) -> Table:
    heads = ("checkpoint", "figure", "committed", "found", "change", "may be", "noise", "verdict")
    rows = []
    for each in findings:
        change = "" if each.change is None else f"{each.change:+.1%}"
        noise = "" if not each.noise else f"± {number(each.noise)}"
        found = "" if each.found is None else number(each.found)
        rows.append((each.checkpoint, each.figure, number(each.expected), found, change, number(each.allowed), noise, each.verdict))
    return heads, rows


def verdict(findings: Sequence[Finding]) -> str:
    """Of all findings, in one sentence."""
    failed = sum(each.has_failed for each in findings)
    if failed:
        return f"{failed} of {len(findings)} figures are worse than they may be."
    return f"All {len(findings)} figures are as good as they were, within limits and noise."


def origins(report: Report) -> list[tuple[str, Provenance]]:
    """What was measured, and where that comes from."""
    found = []
    for each in report.checkpoints:
        if each.text is not None:
            found.append((f"{each.name}, text: {each.text.measured_on}, rows of {each.text.seq_len} tokens", each.text.made))
        if each.tasks is not None:
            partial = ", of files that hold a part" if each.tasks.is_partial_data else ""
            found.append((f"{each.name}, tasks: {each.tasks.suite or 'named one by one'}, mode {each.tasks.settings.mode}{partial}", each.tasks.made))
        if each.speed is not None:
            sizes = f"prompts of {each.speed.num_prompt} tokens, {each.speed.num_output} generated, {each.speed.turns} turns"
            found.append((f"{each.name}, speed: mode {each.speed.mode}, {sizes}", each.speed.made))
    return found


def warnings(report: Report) -> list[str]:
    """Where figures of one table were not found in one way."""
    texts = {(each.text.measured_on, each.text.seq_len, each.text.result.num_tokens) for each in report.checkpoints if each.text is not None}
    suites = {(each.tasks.suite, each.tasks.settings.mode) for each in report.checkpoints if each.tasks is not None}
    speeds = {
        (each.speed.mode, each.speed.num_prompt, each.speed.num_output, each.speed.made.machine.processor, each.speed.made.machine.threads)
        for each in report.checkpoints if each.speed is not None
    }  # fmt: skip
    kinds = (("texts, or parts of one", texts), ("suites or modes", suites), ("modes, sizes or machines", speeds))
    names = ("KL divergences and perplexities", "answers", "speeds")
    return [f"The {name} below are of different {what}, so rows cannot be compared." for name, (what, ways) in zip(names, kinds, strict=True)
            if len(ways) > 1]  # fmt: skip


def origin_text(made: Provenance) -> str:
    machine, versions = made.machine, made.versions
    where = f"{machine.gpu or machine.processor}, {machine.threads} threads of {machine.num_processors} processors"
    return f"{made.date}, quantkit {versions.quantkit}, torch {versions.torch}, transformers {versions.transformers}; {where}; `{made.command}`"


def figure_text(finding: Finding) -> str:
    """A finding on one line."""
    if finding.found is None:
        return f"{finding.figure} was {number(finding.expected)} and is not in the report"
    noise = "" if not finding.noise else f", noise ± {number(finding.noise)}"
    change = "" if finding.change is None else f" ({finding.change:+.1%})"
    shown = f"{number(finding.expected)} to {number(finding.found)}{change}"
    return f"{finding.figure}: {shown}; up to {number(finding.allowed)} is allowed{noise}: {finding.verdict}"


def schemes(checkpoint: CheckpointResult) -> str:
    return ", ".join(f"{count} {name}" for name, count in checkpoint.schemes.items())


def size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def recovery(found: Comparison) -> str:
    if found.recovery is None or found.recovery_low is None or found.recovery_high is None:
        return ""
    return f"{found.recovery:.1%} ({found.recovery_low:.1%} to {found.recovery_high:.1%})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rates(checkpoint: CheckpointResult) -> str:
    if checkpoint.speed is None:
        return ""
    return ", ".join(f"{load.output_rate:,.0f} at {load.num_requests}" for load in checkpoint.speed.loads)
