"""The report as one HTML page that needs nothing else: pictures, tables and styles are in it, and it loads nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from quantkit.report import words
from quantkit.report.charts import charts, names_of
from quantkit.report.check import Finding
from quantkit.report.schema import CheckpointResult, Report


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A checkpoint's layer errors: a row for each block, a column for each kind of layer.

    Attributes:
        cells: by row, error and how hot it is from 0 to 1, None where a block has no such layer.
    """

    name: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[float, float] | None]]]


def page(report: Report, findings: Sequence[Finding] | None = None) -> str:
    """The whole page."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    sections = (
        ("Answers", words.answers(report)), ("Tails and greedy texts", words.tails(report)), ("Speed", words.speeds(report)),
        ("Conversions", words.conversions(report)),
    )  # fmt: skip
    return environment.get_template("page.html").render(
        report=report, warnings=words.warnings(report), charts=charts(report), legend=names_of(report.checkpoints), overview=words.overview(report),
        sections=[(title, table) for title, table in sections if table[1]], heat_maps=[h for each in report.checkpoints if (h := heat_map(each))],
        origins=[(what, words.origin_text(made).replace("`", "")) for what, made in words.origins(report)], findings=findings or (),
        checked=words.findings_table(findings) if findings else None, verdict=words.verdict(findings or ()),
        size=words.size,
    )  # fmt: skip


def heat_map(checkpoint: CheckpointResult) -> HeatMap | None:
    """None of a checkpoint without an account of its conversion."""
    if checkpoint.conversion is None or not checkpoint.conversion.layers:
        return None
    errors: dict[str, dict[str, float]] = defaultdict(dict)
    for layer in checkpoint.conversion.layers:
        block, kind = _place(layer.name)
        errors[block][kind] = max(errors[block].get(kind, 0.0), layer.error)  # of experts the worst
    columns = list(dict.fromkeys(kind for row in errors.values() for kind in row))
    values = sorted(error for row in errors.values() for error in row.values())
    low, high = values[0], values[-1]
    rows = [
        (block, [(row[kind], (row[kind] - low) / (high - low) if high > low else 0.0) if kind in row else None for kind in columns])
        for block, row in errors.items()
    ]
    return HeatMap(checkpoint.name, columns, rows)


def _place(name: str) -> tuple[str, str]:
    """Block and kind of a layer's name: model.layers.3.mlp.experts.7.up_proj is of block 3, and an experts.up_proj."""
    found = re.search(r"\.(\d+)\.(.*)", name)
    if found is None:
        return "outside", name
    kind = re.sub(r"\.\d+(?=\.)", "", found[2])
    return found[1], re.sub(r"^(self_attn|mlp|attention)\.", "", kind)
