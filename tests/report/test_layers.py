"""Where in a model the error is: maps, lines by depth and worst layers, of those checkpoints that have an account of their layers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from quantkit.report.charts import charts
from quantkit.report.describe import _conversion
from quantkit.report.heat_map import heat_map
from quantkit.report.layers import Heat, LayerGrid, by_depth, layer_grid, place, worst_layers
from quantkit.report.markdown import markdown
from quantkit.report.page import page
from quantkit.report.schema import CheckpointResult, Conversion, LayerError, Report
from quantkit.report.words import conversions
from tests.report.test_check import report_of, text_result

SVG = "{http://www.w3.org/2000/svg}"


def converted(errors: dict[str, float], *, experts: str | None = None, **layer: Any) -> CheckpointResult:
    layers = [LayerError(name=name, scheme="w4a16", error=error, **layer) for name, error in errors.items()]
    made = Conversion(recipe="r", seconds=1, peak_memory_bytes=1, calibration=None, layers=layers, versions={}, experts=experts)
    return report_of(conversion=made).checkpoints[0]


def deep(num_blocks: int, kinds: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj")) -> CheckpointResult:
    return converted({f"model.layers.{block}.{kind}": 1e-3 * (block + 1) for block in range(num_blocks) for kind in kinds})


def beside(*checkpoints: CheckpointResult) -> Report:
    return report_of().model_copy(update={"checkpoints": list(checkpoints)})


def grid_of(checkpoint: CheckpointResult) -> LayerGrid:
    grid = layer_grid(checkpoint)
    assert grid is not None
    return grid


def texts(svg: str, kind: str) -> list[str]:
    """What elements of this kind say, the titles within them aside."""
    return ["".join([each.text or "", *(inner.tail or "" for inner in each)]) for each in ElementTree.fromstring(svg).iter(f"{SVG}{kind}")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("model.layers.3.mlp.experts.7.up_proj", ("3", "experts.up_proj")), ("model.layers.12.self_attn.q_proj", ("12", "q_proj")),
     ("transformer.h.0.attn.c_attn", ("0", "attn.c_attn")), ("lm_head", ("outside", "lm_head"))],
)  # fmt: skip
def test_a_layers_place_is_its_block_and_its_kind(name: str, wanted: tuple[str, str]) -> None:
    assert place(name) == wanted


def test_of_experts_the_worst_stands_in_the_map_and_blocks_are_in_order() -> None:
    experts = {f"model.layers.0.mlp.experts.{n}.up_proj": error for n, error in enumerate((0.1, 0.4, 0.2))}
    grid = grid_of(converted({"lm_head": 0.3, "model.layers.10.mlp.up_proj": 0.1, "model.layers.9.mlp.up_proj": 0.1} | experts))

    assert grid.blocks == ["0", "9", "10", "outside"] and grid.kinds == ["lm_head", "up_proj", "experts.up_proj"]
    assert grid.layers["experts.up_proj", "0"].name == "model.layers.0.mlp.experts.1.up_proj"


def test_one_scale_is_logarithmic_over_all_checkpoints() -> None:
    heat = Heat.of([grid_of(converted({"l.0.a": 1e-4, "l.1.a": 0.0})), grid_of(converted({"l.0.a": 1e-2}))])

    assert (heat.low, heat.high) == (1e-4, 1e-2)
    assert [heat(error) for error in (0.0, 1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0, 0.5, 1])
    assert Heat.of([grid_of(converted({"l.0.a": 0.0}))])(0.0) == 0.0


@pytest.mark.parametrize("num_blocks", [1, 6, 80, 200])
def test_every_cell_tells_its_layer_and_lies_within_the_picture(num_blocks: int) -> None:
    kinds = ("self_attn.q_proj", "mlp.a_projection_of_such_a_name_as_custom_code_may_have")
    grid = grid_of(deep(num_blocks, kinds))

    chart = heat_map(grid, Heat.of([grid]))

    picture = ElementTree.fromstring(chart.svg)
    _, _, width, height = (float(value) for value in picture.get("viewBox", "").split())
    cells = [group for group in picture.findall(f"{SVG}g") if group.find(f"{SVG}rect") is not None]
    assert len(cells) == 2 * num_blocks
    assert f"model.layers.{num_blocks - 1}.{kinds[1]}: {num_blocks * 1e-3:.2e}, w4a16" in texts(chart.svg, "title")
    for rect in picture.iter(f"{SVG}rect"):
        x, y, wide, high = (float(rect.get(side, "nan")) for side in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + wide <= width and y + high <= height
    labels = texts(chart.svg, "text")
    assert max(map(len, labels)) <= 24 and "…" in "".join(labels)
    assert any(label == f"{1e-3:.1e}" for label in labels), "the scale, or a number in a cell"
    placed = sorted(float(text.get("x", "nan")) for text in picture.iter(f"{SVG}text") if (text.text or "").isdigit())
    assert all(second - first >= 26 for first, second in pairwise(placed)), "numbers of blocks stand apart"


def test_the_line_by_depth_is_the_mean_of_each_blocks_layers() -> None:
    errors = {"l.1.a": 0.3, "l.0.a": 0.1, "l.0.b": 0.2, "l.0.experts.0.c": 0.6, "lm_head": 9.0}

    assert by_depth(converted(errors)) == [(0, pytest.approx(np.mean([0.1, 0.2, 0.6]))), (1, pytest.approx(0.3))]
    (chart,) = charts(beside(converted(errors), report_of().checkpoints[0]))
    assert chart.title == "Error by depth" and [text for text in texts(chart.svg, "title") if text] == [
        "small, of weights", "small, block 0: 3.00e-01", "small, block 1: 3.00e-01",
    ]  # fmt: skip


def test_size_and_kl_stand_with_their_error() -> None:
    (chart,) = charts(report_of(text=text_result(0.02, 0.003)))

    assert "small: 0.0 MB, 0.02000 ± 0.00300 nats a token" in texts(chart.svg, "title") and "± 0.0030" in chart.alt
    (unsure,) = charts(report_of(text=text_result(0.02, math.nan)))
    assert "nan" not in unsure.svg.lower()


def test_the_worst_layers_are_named_with_what_befell_them() -> None:
    checkpoint = converted({f"l.{n}.a": n / 10 for n in range(6)}, note="few | tokens", seen_tokens=1234)

    assert [layer.name for layer in worst_layers(checkpoint, 3)] == ["l.5.a", "l.4.a", "l.3.a"]
    text = markdown(beside(checkpoint))
    assert "| small | l.5.a | w4a16 | 5.00e-01 | 1,234 | few \\| tokens |" in text and "| l.2.a |" not in text
    assert "l.5.a" in page(beside(checkpoint)).split("Worst layers")[1]


def test_other_tools_checkpoints_have_no_such_picture_and_it_is_said() -> None:
    mixed, foreign = beside(deep(2), report_of(name="another's").checkpoints[0]), beside(report_of(name="another's").checkpoints[0])

    for text in (page(mixed).replace("&#39;", "'"), markdown(mixed), markdown(foreign), page(foreign).replace("&#39;", "'")):
        assert "Nothing is known of the layers of another's: no quantkit_report.json beside the weights says" in text
    assert page(mixed).count('class="heat"') == 1 and 'class="heat"' not in page(foreign)
    assert "Nothing is known" not in page(beside(deep(2)))


def test_what_was_moved_has_no_errors_beside_the_original() -> None:
    made = deep(2).conversion
    assert made is not None
    moved = report_of(conversion=made.model_copy(update={"recipe": None})).checkpoints[0]

    assert layer_grid(moved) is None and not by_depth(moved) and not worst_layers(moved, 3)
    assert "Nothing is known of the layers of small" in page(beside(moved)) and not charts(beside(moved))


def test_what_calibration_said_of_experts_is_passed_on(tmp_path: Path) -> None:
    layer = {"name": "l.0.a", "scheme": "w4a16", "error": 0.1, "note": "fell back", "seen_tokens": 12, "rounding": "GPTQ"}
    account = {"recipe": "r", "seconds": 1.0, "peak_memory_bytes": 1, "calibration": "calibration: rows", "versions": {}, "layers": [layer]}
    (tmp_path / "quantkit_report.json").write_text(json.dumps(account | {"experts": {"summary": "8 experts", "layers": []}}))

    made = _conversion(tmp_path)

    assert made is not None and (made.experts, made.layers[0].note, made.layers[0].seen_tokens) == ("8 experts", "fell back", 12)
    assert "calibration: rows; 8 experts" in markdown(report_of(conversion=made))
    (tmp_path / "quantkit_report.json").write_text(json.dumps(account | {"layers": [{"name": "l.0.a", "scheme": "w4a16", "error": 0.1}]}))
    earlier = _conversion(tmp_path)
    assert earlier is not None and earlier.experts is None and earlier.layers[0].note is None


def test_names_of_layers_break_out_of_no_picture() -> None:
    odd = "l.0.<script>alert(1)</script>&\"'"
    checkpoint = converted({odd: 0.1}, note="<b>")

    assert "<script>" not in page(beside(checkpoint)) and "<b>" not in page(beside(checkpoint))
    grid = grid_of(checkpoint)
    assert f"{odd}: 1.00e-01, w4a16, <b>" in texts(heat_map(grid, Heat.of([grid])).svg, "title")


def test_errors_of_outputs_and_of_weights_are_told_apart_and_have_scales_of_their_own() -> None:
    calibrated, plain = converted({"l.0.a": 1e-4, "l.1.a": 2e-4}, seen_tokens=100), converted({"l.0.a": 1e-2, "l.1.a": 5e-2})
    report = beside(calibrated, plain.model_copy(update={"name": "plain"}))

    html, rows = page(report), conversions(report)[1]

    assert [row[3] for row in rows] == ["1.50e-04 of outputs", "3.00e-02 of weights"]
    assert all(f"{low}</text>" in html for low in ("1.0e-04", "2.0e-04", "1.0e-02", "5.0e-02"))
    assert "error of outputs" in html and "error of weights" in html and "(dashed: weights)" in html
