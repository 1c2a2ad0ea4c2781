"""The report's charts as SVG whose colors are the page's: it is one picture in the light and in the dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quantkit.report.check import recoveries
from quantkit.report.schema import CheckpointResult, Report

MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
"""matplotlib's marker and the character that looks like it, one for each checkpoint in turn."""
_NAMED = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--line)", "#040404": "var(--base)"}
_INK, _SOFT, _LINE, _BASE = _NAMED
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "quantkit", "text.parse_math": False, "font.family": "sans-serif", "font.size": 11, "text.color": _INK,
    "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT, "axes.edgecolor": _LINE, "grid.color": _LINE, "axes.grid": True,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 7,
}  # fmt: skip
_LEAST = 1e-7
"""Of a KL divergence on a logarithmic axis; float32 tells no less apart."""
_WIDTH, _HEIGHT = 4.6, 3.2


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture and what it says, for those who cannot see it.

    Attributes:
        svg: an element without a document's head.
    """

    title: str
    svg: str
    alt: str


def charts(report: Report) -> list[Chart]:
    """Those that there are results for."""
    with matplotlib.rc_context(_STYLE):
        return [chart for make in (_pareto, _positions, _throughput, _first_tokens, _recoveries) if (chart := make(report)) is not None]


def _pareto(report: Report) -> Chart | None:
    points = [(number, each, max(each.text.result.kl_mean, _LEAST)) for number, each in enumerate(report.checkpoints) if each.text is not None]
    if not points:
        return None
    front = _front([(each.file_bytes, kl) for _, each, kl in points])
    with _axes() as (figure, axes):
        axes.axvline(report.baseline.file_bytes / 1e6, color=_BASE, linestyle=":", linewidth=1.2)
        if len(front) > 1:
            axes.step([x / 1e6 for x, _ in front], [y for _, y in front], where="post", color=_SOFT, linewidth=1, zorder=1)
        for number, each, kl in points:
            axes.plot(each.file_bytes / 1e6, kl, **_mark(number), linestyle="none")
        axes.set(xlabel="weight files, MB (dotted: the original)", ylabel="KL divergence, nats a token", yscale="log")
        axes.set_xlim(left=0)
        _plain_log(axes)
        said = "; ".join(f"{each.name} {each.file_bytes / 1e6:.1f} MB, {kl:.4f}" for _, each, kl in points)
        return Chart("Size against KL divergence", _svg(figure), f"Size and KL divergence of each checkpoint: {said}")


def _positions(report: Report) -> Chart | None:
    kept = [(number, each) for number, each in enumerate(report.checkpoints) if each.text is not None and len(each.text.result.by_position) > 1]
    if not kept:
        return None
    with _axes() as (figure, axes):
        for number, each in kept:
            parts = each.text.result.by_position if each.text is not None else []
            axes.errorbar(
                [(part.start + part.end) / 2 for part in parts], [part.kl_mean for part in parts], [2 * part.kl_se for part in parts],
                **_mark(number), elinewidth=1, capsize=2,
            )  # fmt: skip
        axes.set(xlabel="position in the text, tokens", ylabel="KL divergence (± 2 errors)", xscale="log", yscale="log")
        _plain_log(axes)
        return Chart("KL divergence by position", _svg(figure), "Mean KL divergence of each checkpoint by position in the text")


def _recoveries(report: Report) -> Chart | None:
    rows = [(number, task, score.comparison) for number, each in enumerate(report.checkpoints) for task, score in recoveries(each).items()]
    rows = sorted(((number, task, found) for number, task, found in rows if found is not None), key=lambda row: row[1])
    if not rows:
        return None
    with _axes(height=max(_HEIGHT, 0.9 + 0.27 * len(rows))) as (figure, axes):
        axes.axvline(100, color=_BASE, linestyle=":", linewidth=1.2)
        for place, (number, _, found) in enumerate(rows):
            low, middle, high = (100 * (value or 0.0) for value in (found.recovery_low, found.recovery, found.recovery_high))
            axes.errorbar(middle, -place, xerr=[[middle - low], [high - middle]], **_mark(number), elinewidth=1.4, capsize=3)
        firsts = {task: -place for place, (_, task, _) in reversed(list(enumerate(rows)))}
        axes.set_yticks(list(firsts.values()), [task.replace(" ", "\n", 1) for task in firsts])
        axes.set(xlabel="recovery, %")
        axes.grid(visible=False, axis="y")
        return Chart("Recovery by task", _svg(figure), "Recovery of each checkpoint on each task with its interval; the table below has the numbers")


def _throughput(report: Report) -> Chart | None:
    return _of_load(report, "Output under load", "times the original's, in turns", is_ratio=True)


def _first_tokens(report: Report) -> Chart | None:
    return _of_load(report, "Time to the first token under load", "ms, median", is_ratio=False)


def _of_load(report: Report, title: str, label: str, *, is_ratio: bool) -> Chart | None:
    kept = [(number, each) for number, each in enumerate(report.checkpoints) if each.speed is not None]
    if not kept:
        return None
    with _axes() as (figure, axes):
        if is_ratio:
            axes.axhline(1, color=_BASE, linestyle=":", linewidth=1.2)
        for number, each in kept:
            loads = each.speed.loads if each.speed is not None else []
            counts = [load.num_requests for load in loads]
            if is_ratio:
                reach = [[load.ratio - load.ratio_low for load in loads], [load.ratio_high - load.ratio for load in loads]]
                axes.errorbar(counts, [load.ratio for load in loads], reach, **_mark(number), elinewidth=1, capsize=3)
            else:
                axes.plot(counts, [load.first_token_ms for load in loads], **_mark(number))
        axes.set(xlabel=f"requests at once{' (dotted: the original)' if is_ratio else ''}", ylabel=label, xscale="log", yscale="log")
        counts = sorted({load.num_requests for _, each in kept if each.speed is not None for load in each.speed.loads})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        _plain_log(axes, x=False)
        return Chart(title, _svg(figure), f"{title} of each checkpoint; the table below has the numbers")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, from the smallest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _mark(number: int) -> dict[str, Any]:
    """Of the checkpoint of this number; the color is named, and given by the page."""
    return {"color": f"#0{number % len(MARKS)}0b0c", "marker": MARKS[number % len(MARKS)][0]}


@contextmanager
def _axes(height: float = _HEIGHT) -> Iterator[tuple[Figure, Any]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    yield figure, figure.add_subplot()


def _plain_log(axes: Any, *, x: bool = True) -> None:
    """Numbers instead of powers on logarithmic axes."""
    for axis, scale in ((axes.xaxis, axes.get_xscale() if x else ""), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    """Without head, background and fixed size, with the page's colors by name."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    for name, color in _NAMED.items():
        svg = svg.replace(name, color)
    return re.sub(r"#0(\d)0b0c", r"var(--c\1)", svg)


def names_of(checkpoints: Sequence[CheckpointResult]) -> list[tuple[int, str, str]]:
    """Color, character and name of each, for a legend."""
    return [(number % len(MARKS), MARKS[number % len(MARKS)][1], each.name) for number, each in enumerate(checkpoints)]
