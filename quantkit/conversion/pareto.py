"""Size against KL divergence as a picture, where matplotlib is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.checkpoint.disk import disk_errors


def draw_pareto(outcome: dict[str, Any], path: Path, title: str) -> list[str]:
    """Write a PNG of the best choices, the uniform schemes and what was made; without matplotlib nothing, and a sentence that says so."""
    if find_spec("matplotlib") is None:
        return ["the plot of size against KL needs matplotlib (pip install 'quantkit[report]'); its data is in the allocation file"]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*_columns(outcome["pareto"]), "-", color="#4477aa", label="best choice, predicted")
    axes.plot(*_columns(outcome["uniform"].values()), "s", color="#bbbbbb", label="one scheme for all, predicted")
    for name, point in outcome["uniform"].items():
        if point["predicted_kl"] > 0:
            axes.annotate(name, (point["linear_bpw"], point["predicted_kl"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if outcome["measured_kl"]:
        axes.plot([outcome["linear_bpw"]], [outcome["measured_kl"]], "*", color="#cc3311", markersize=11, label="this model, measured")
    axes.set(yscale="log", xlabel="bits per weight in quantized layers", ylabel="KL divergence, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with disk_errors(path):
        figure.savefig(path, dpi=120, metadata={"Software": None})
    return []


def _columns(points: Any) -> tuple[list[float], list[float]]:
    shown = [point for point in points if point["predicted_kl"] > 0]
    return [point["linear_bpw"] for point in shown], [point["predicted_kl"] for point in shown]
