"""The report's charts: each of what there are results for, of all checkpoints in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from matplotlib.ticker import MaxNLocator, NullFormatter

from quantkit.core.divergence import DivergenceResult
from quantkit.report.check import recoveries
from quantkit.report.drawing import BASE, HEIGHT, SOFT, Chart, drawing, mark, plain_log
from quantkit.report.layers import by_depth, errors_of
from quantkit.report.schema import Report

_LEAST = 1e-7
"""Of a KL divergence on a logarithmic axis; float32 tells no less apart."""

_FEW_BLOCKS = 40
"""Of which marks have room beside each other."""


def charts(report: Report) -> list[Chart]:
    """Those that there are results for."""
    makers = (_pareto, _positions, _depths, _throughput, _first_tokens, _recoveries)
    return [chart for make in makers if (chart := make(report)) is not None]


def _pareto(report: Report) -> Chart | None:
    points = [(number, each, _kl(each.text.result)) for number, each in enumerate(report.checkpoints) if each.text is not None]
    if not points:
        return None
    front = _front([(each.file_bytes, kl) for _, each, (kl, _) in points])
    with drawing() as drawn:
        axes = drawn.axes
        axes.axvline(report.baseline.file_bytes / 1e6, color=BASE, linestyle=":", linewidth=1.2)
        if len(front) > 1:
            axes.step([x / 1e6 for x, _ in front], [y for _, y in front], where="post", color=SOFT, linewidth=1, zorder=1)
        for number, each, (kl, error) in points:
            below = min(2 * error, 0.9 * kl)  # an error bar of a logarithmic axis ends above zero
            bar = axes.errorbar(each.file_bytes / 1e6, kl, [[below], [2 * error]], **mark(number), linestyle="none", elinewidth=1, capsize=3)
            drawn.tell(bar.lines[0], f"{each.name}: {each.file_bytes / 1e6:.1f} MB, {kl:.5f} ± {error:.5f} nats a token")
        axes.set(xlabel="weight files, MB (dotted: the original)", ylabel="KL divergence, nats (± 2 errors)", yscale="log")
        axes.set_xlim(left=0)
        plain_log(axes)
        said = "; ".join(f"{each.name} {each.file_bytes / 1e6:.1f} MB, {kl:.4f} ± {error:.4f}" for _, each, (kl, error) in points)
        return Chart("Size against KL divergence", drawn.svg(), f"Size and KL divergence of each checkpoint: {said}")


def _positions(report: Report) -> Chart | None:
    kept = [(number, each) for number, each in enumerate(report.checkpoints) if each.text is not None and len(each.text.result.by_position) > 1]
    if not kept:
        return None
    with drawing() as drawn:
        axes = drawn.axes
        for number, each in kept:
            parts = each.text.result.by_position if each.text is not None else []
            axes.errorbar(
                [(part.start + part.end) / 2 for part in parts], [part.kl_mean for part in parts], [2 * part.kl_se for part in parts],
                **mark(number), elinewidth=1, capsize=2,
            )  # fmt: skip
        axes.set(xlabel="position in the text, tokens", ylabel="KL divergence (± 2 errors)", xscale="log", yscale="log")
        plain_log(axes)
        return Chart("KL divergence by position", drawn.svg(), "Mean KL divergence of each checkpoint by position in the text")


def _kl(result: DivergenceResult) -> tuple[float, float]:
    """Mean and standard error as they are drawn; a single token has no error."""
    return max(result.kl_mean, _LEAST), result.kl_se if isfinite(result.kl_se) else 0.0


def _depths(report: Report) -> Chart | None:
    kept = [(number, each, depth) for number, each in enumerate(report.checkpoints) if (depth := by_depth(each))]
    if not kept:
        return None
    with drawing() as drawn:
        for number, each, depth in kept:
            color, sign = mark(number).values()
            size = 5 if len(depth) <= _FEW_BLOCKS else 2.5
            blocks, errors = [block for block, _ in depth], [max(error, _LEAST) for _, error in depth]
            style = "-" if errors_of(each) == "outputs" else "--"
            drawn.tell(*drawn.axes.plot(blocks, errors, color=color, linestyle=style), f"{each.name}, of {errors_of(each)}")
            for block, error in zip(blocks, errors, strict=True):
                drawn.tell(*drawn.axes.plot(block, error, color=color, marker=sign, markersize=size), f"{each.name}, block {block}: {error:.2e}")
        found = {errors_of(each) for _, each, _ in kept}
        of = "outputs (dashed: weights)" if len(found) > 1 else found.pop()
        drawn.axes.set(xlabel="block", ylabel=f"mean error of its layers' {of}", yscale="log")
        drawn.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_log(drawn.axes, x=False)
        ends = "; ".join(f"{each.name} from {depth[0][1]:.1e} in the first block to {depth[-1][1]:.1e} in the last" for _, each, depth in kept)
        return Chart("Error by depth", drawn.svg(), f"Mean relative squared error of each block's layers: {ends}")


def _recoveries(report: Report) -> Chart | None:
    rows = [(number, task, score.comparison) for number, each in enumerate(report.checkpoints) for task, score in recoveries(each).items()]
    rows = sorted(((number, task, found) for number, task, found in rows if found is not None), key=lambda row: row[1])
    if not rows:
        return None
    with drawing(height=max(HEIGHT, 0.9 + 0.27 * len(rows))) as drawn:
        axes = drawn.axes
        axes.axvline(100, color=BASE, linestyle=":", linewidth=1.2)
        for place, (number, _, found) in enumerate(rows):
            low, middle, high = (100 * (value or 0.0) for value in (found.recovery_low, found.recovery, found.recovery_high))
            axes.errorbar(middle, -place, xerr=[[middle - low], [high - middle]], **mark(number), elinewidth=1.4, capsize=3)
        firsts = {task: -place for place, (_, task, _) in reversed(list(enumerate(rows)))}
        axes.set_yticks(list(firsts.values()), [task.replace(" ", "\n", 1) for task in firsts])
        axes.set(xlabel="recovery, %")
        axes.grid(visible=False, axis="y")
        return Chart("Recovery by task", drawn.svg(), "Recovery of each checkpoint on each task with its interval; the table below has the numbers")


def _throughput(report: Report) -> Chart | None:
    return _of_load(report, "Output under load", "times the original's, in turns", is_ratio=True)


def _first_tokens(report: Report) -> Chart | None:
    return _of_load(report, "Time to the first token under load", "ms, median", is_ratio=False)


def _of_load(report: Report, title: str, label: str, *, is_ratio: bool) -> Chart | None:
    kept = [(number, each) for number, each in enumerate(report.checkpoints) if each.speed is not None]
    if not kept:
        return None
    with drawing() as drawn:
        axes = drawn.axes
        if is_ratio:
            axes.axhline(1, color=BASE, linestyle=":", linewidth=1.2)
        for number, each in kept:
            loads = each.speed.loads if each.speed is not None else []
            counts = [load.num_requests for load in loads]
            if is_ratio:
                reach = [[load.ratio - load.ratio_low for load in loads], [load.ratio_high - load.ratio for load in loads]]
                axes.errorbar(counts, [load.ratio for load in loads], reach, **mark(number), elinewidth=1, capsize=3)
            else:
                axes.plot(counts, [load.first_token_ms for load in loads], **mark(number))
        axes.set(xlabel=f"requests at once{' (dotted: the original)' if is_ratio else ''}", ylabel=label, xscale="log", yscale="log")
        counts = sorted({load.num_requests for _, each in kept if each.speed is not None for load in each.speed.loads})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        plain_log(axes, x=False)
        return Chart(title, drawn.svg(), f"{title} of each checkpoint; the table below has the numbers")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, from the smallest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
