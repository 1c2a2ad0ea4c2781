"""Rows to calibrate on come first; those to measure on are a share of what there is."""

from __future__ import annotations

import pytest
import torch

from quantkit.conversion.calibration import CalibrationOptions, CalibrationReport, CalibrationSet
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.rows import num_held_out, split_rows


def rows(count: int) -> CalibrationSet:
    ids = torch.zeros(count, 4, dtype=torch.int64)
    return CalibrationSet(ids, ids, ids == 0, CalibrationReport("made", count, 4 * count, count, 4))


def sizes(there: int, *, asked: int, measure: bool = True) -> tuple[int, int]:
    options = ConvertOptions(calibration=CalibrationOptions(num_samples=asked), measure=measure)
    calibration, held_out = split_rows(rows(there), options)
    return len(calibration.input_ids), 0 if held_out is None else len(held_out.input_ids)


@pytest.mark.parametrize(("there", "shared"), [(1, (1, 0)), (2, (1, 1)), (8, (7, 1)), (19, (17, 2)), (40, (35, 5)), (250, (234, 16))])
def test_data_that_ends_early_is_mostly_calibrated_on(there: int, shared: tuple[int, int]) -> None:
    assert sizes(there, asked=256) == shared


@pytest.mark.parametrize("asked", [1, 2, 8, 32, 256, 1000])
def test_all_rows_asked_for_calibrate_when_there_are_enough(asked: int) -> None:
    assert sizes(asked + num_held_out(asked), asked=asked) == (asked, num_held_out(asked))


def test_nothing_is_held_out_where_nothing_is_measured() -> None:
    assert sizes(19, asked=256, measure=False) == (19, 0)
