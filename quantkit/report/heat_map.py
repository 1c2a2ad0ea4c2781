"""Layer errors as a map: a column for each block, a row for each kind of layer. SVG in the page's colors; every cell tells its layer."""

from __future__ import annotations

from html import escape

from quantkit.report.drawing import Chart
from quantkit.report.layers import Heat, LayerGrid
from quantkit.report.schema import LayerError

_ROW, _LABEL, _TOP, _BOTTOM = 22, 176, 4, 58
_WIDTH, _NARROWEST, _WIDEST, _OF_NUMBER, _OF_TICK = 900, 9, 52, 44, 26
"""Pixels: what a map likes to take, a cell's least and most, and what a number in a cell and one below the map need."""
_LETTERS = 24
_STEPS = 8


def heat_map(grid: LayerGrid, heat: Heat) -> Chart:
    """One checkpoint's map."""
    wide = max(_NARROWEST, min(_WIDEST, _WIDTH // len(grid.blocks)))
    width, height = _LABEL + max(wide * len(grid.blocks), 280) + 8, _TOP + _ROW * len(grid.kinds) + _BOTTOM
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    for row, kind in enumerate(grid.kinds):
        y = _TOP + _ROW * row
        parts.append(_text(_LABEL - 8, y + 15, _short(kind), anchor="end", told=kind))
        for column, block in enumerate(grid.blocks):
            layer = grid.layers.get((kind, block))
            if layer is not None:
                parts.append(_cell(_LABEL + wide * column, y, wide, layer, heat(layer.error)))
    parts += [*_ticks(grid, wide), *_key(height - 12, heat, grid.of), "</svg>"]
    worst = max(grid.layers.values(), key=lambda layer: layer.error)
    alt = f"Error of each layer's {grid.of} of {grid.name} by block and kind; the worst is {worst.name}, {worst.error:.1e}"
    return Chart(grid.name, "".join(parts), alt)


def _cell(x: float, y: float, wide: int, layer: LayerError, hot: float) -> str:
    told = f"{layer.name}: {layer.error:.2e}, {layer.scheme}{f', {layer.note}' if layer.note else ''}"
    number = _text(x + wide / 2, y + 15, f"{layer.error:.1e}", anchor="middle", size=9.5) if wide >= _OF_NUMBER else ""
    return f"<g><title>{escape(told)}</title>{_square(x, y, wide, hot)}{number}</g>"


def _square(x: float, y: float, wide: float, hot: float) -> str:
    size = f'x="{x + 0.5:g}" y="{y + 0.5:g}" width="{wide - 1:g}" height="{_ROW - 1}"'
    return f'<rect {size} rx="2" fill="var(--hot)" fill-opacity="{0.06 + 0.74 * hot:.3f}"/>'


def _ticks(grid: LayerGrid, wide: int) -> list[str]:
    """Blocks' numbers, as many as there is room for."""
    y, every = _TOP + _ROW * len(grid.kinds) + 15, -(-_OF_TICK // wide)
    shown = [(column, block) for column, block in enumerate(grid.blocks) if column % every == 0]
    numbers = [_text(_LABEL + wide * (column + 0.5), y, block, anchor="middle", soft=True) for column, block in shown]
    return [_text(_LABEL - 8, y, "block", anchor="end", soft=True), *numbers]


def _key(y: float, heat: Heat, of: str) -> list[str]:
    """The scale, under the map."""
    start, end = _LABEL + 52, _LABEL + 52 + 18 * _STEPS + 6
    squares = [_square(start + 18 * step, y - 15, 18, step / (_STEPS - 1)) for step in range(_STEPS)]
    ends = [_text(_LABEL, y, f"{heat.low:.1e}", soft=True), _text(end, y, f"{heat.high:.1e}", soft=True)]
    return [_text(_LABEL - 8, y, f"error of {of}", anchor="end", soft=True), *ends, *squares]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = 11, soft: bool = False, told: str = "") -> str:
    title = f"<title>{escape(told)}</title>" if told and told != text else ""
    style = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}" fill="var(--{"soft" if soft else "ink"})"'
    return f"<text {style}>{title}{escape(text)}</text>"


def _short(kind: str) -> str:
    """The end of a long name says most."""
    return kind if len(kind) <= _LETTERS else f"…{kind[1 - _LETTERS :]}"
