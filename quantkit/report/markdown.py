"""The report as Markdown that fits a pull request: tables, and what is behind them folded away."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from quantkit.report import words
from quantkit.report.check import Finding
from quantkit.report.schema import Report

_UNMOVED = 0.005
"""A change that is not worth a line."""


def markdown(report: Report, findings: Sequence[Finding] | None = None) -> str:
    """Parts without results are left out, and figures that did not move."""
    lines = [f"## quantkit: {len(report.checkpoints)} of {_cell(report.baseline.name)}", ""]
    if findings:
        lines += [f"**{words.verdict(findings)}**", "", *table(words.findings_table([each for each in findings if _has_moved(each)])), ""]
    lines += [*(f"> {warning}" for warning in words.warnings(report)), *table(words.overview(report)), ""]
    for title, each in (("Answers", words.answers(report)), ("Tails and greedy texts", words.tails(report)), ("Speed", words.speeds(report))):
        if each[1]:
            lines += [f"### {title}", "", *table(each), ""]
    unknown = words.unknown_layers(report)
    if words.conversions(report)[1]:
        lines += ["<details><summary>Conversions</summary>", "", *table(words.conversions(report)), "", "</details>", ""]
    if words.worst(report)[1] or unknown:
        lines += ["<details><summary>Worst layers</summary>", "", *table(words.worst(report)), "", *([_cell(unknown), ""] if unknown else [])]
        lines += ["</details>", ""]
    lines += ["<details><summary>Where the figures come from</summary>", ""]
    lines += [f"- {_cell(what)}: {html.escape(words.origin_text(made), quote=False)}" for what, made in words.origins(report)]
    return "\n".join([*lines, "", "</details>", ""])


def table(content: words.Table) -> list[str]:
    heads, rows = content
    if not rows:
        return []
    return ["| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *(tuple(map(_cell, row)) for row in rows))]


def _has_moved(finding: Finding) -> bool:
    return finding.has_failed or (finding.verdict != "same" and abs(finding.change or 0.0) > _UNMOVED)


def _cell(text: str) -> str:
    return re.sub(r"([|`\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
