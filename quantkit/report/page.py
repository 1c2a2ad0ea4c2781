"""The report as one HTML page that needs nothing else: pictures, tables and styles are in it, and it loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from quantkit.report import words
from quantkit.report.charts import charts
from quantkit.report.check import Finding
from quantkit.report.drawing import names_of
from quantkit.report.heat_map import heat_map
from quantkit.report.layers import Heat, layer_grid
from quantkit.report.schema import Report


def page(report: Report, findings: Sequence[Finding] | None = None) -> str:
    """The whole page."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    sections = (
        ("Answers", words.answers(report)), ("Tails and greedy texts", words.tails(report)), ("Speed", words.speeds(report)),
        ("Conversions", words.conversions(report)),
    )  # fmt: skip
    grids = [grid for each in report.checkpoints if (grid := layer_grid(each)) is not None]
    heats = {of: Heat.of(grid for grid in grids if grid.of == of) for of in {grid.of for grid in grids}}
    return environment.get_template("page.html").render(
        report=report, warnings=words.warnings(report), charts=charts(report), legend=names_of(report.checkpoints), overview=words.overview(report),
        sections=[(title, table) for title, table in sections if table[1]], heat_maps=[heat_map(grid, heats[grid.of]) for grid in grids],
        worst=words.worst(report), unknown_layers=words.unknown_layers(report),
        origins=[(what, words.origin_text(made).replace("`", "")) for what, made in words.origins(report)], findings=findings or (),
        checked=words.findings_table(findings) if findings else None, verdict=words.verdict(findings or ()),
        size=words.size,
    )  # fmt: skip
