"""How the report's charts are drawn: as SVG whose colors are the page's, so that it is one picture in the light and in the dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quantkit.report.schema import CheckpointResult

MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
"""matplotlib's marker and the character that looks like it, one for each checkpoint in turn."""
_NAMED = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--line)", "#040404": "var(--base)"}
INK, SOFT, LINE, BASE = _NAMED
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "quantkit", "text.parse_math": False, "font.family": "sans-serif", "font.size": 11, "text.color": INK,
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": LINE, "grid.color": LINE, "axes.grid": True,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 7,
}  # fmt: skip
WIDTH, HEIGHT = 4.6, 3.2


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture and what it says, for those who cannot see it.

    Attributes:
        svg: an element without a document's head.
    """

    title: str
    svg: str
    alt: str


@dataclass(eq=False, slots=True)
class Drawing:
    """One chart in the making: what is drawn in `axes`, and the words that parts of it show under the pointer."""

    figure: Figure
    axes: Any
    _words: list[str] = field(default_factory=list)

    def tell(self, artist: Artist, text: str) -> None:
        artist.set_gid(f"told-{len(self._words)}")
        self._words.append(text)

    def svg(self) -> str:
        """Without head, background and fixed size, with the page's colors by name."""
        out = io.StringIO()
        self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        for size in ("width", "height"):
            svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
        for name, color in _NAMED.items():
            svg = svg.replace(name, color)
        svg = re.sub(r'<g id="told-(\d+)">', lambda found: f"<g><title>{html.escape(self._words[int(found[1])])}</title>", svg)
        return re.sub(r"#0(\d)0b0c", r"var(--c\1)", svg)


@contextmanager
def drawing(height: float = HEIGHT) -> Iterator[Drawing]:
    """An empty chart of this many inches, in the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield Drawing(figure, figure.add_subplot())


def mark(number: int) -> dict[str, Any]:
    """Of the checkpoint of this number; the color is named, and given by the page."""
    return {"color": f"#0{number % len(MARKS)}0b0c", "marker": MARKS[number % len(MARKS)][0]}


def plain_log(axes: Any, *, x: bool = True) -> None:
    """Numbers instead of powers on logarithmic axes."""
    for axis, scale in ((axes.xaxis, axes.get_xscale() if x else ""), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def names_of(checkpoints: Sequence[CheckpointResult]) -> list[tuple[int, str, str]]:
    """Color, character and name of each, for a legend."""
    return [(number % len(MARKS), MARKS[number % len(MARKS)][1], each.name) for number, each in enumerate(checkpoints)]
