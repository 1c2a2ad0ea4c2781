from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantkit.bench.load import CASES, Case, Size, measure
from quantkit.bench.random_checkpoint import write_random_checkpoint
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_load_holds_little_beside_the_packed_model_and_its_cache(tmp_path: Path) -> None:
    """A quarter more at full size; here the layers are a larger part of the model."""
    (result,) = measure((Case("small", "w4a16-rtn", mode="exact"),), tmp_path, Size(layers=6, hidden=1024, intermediate=2816))
    assert 20e6 < result.packed_bytes < 60e6
    assert result.ratio < 1.6
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["FP8 at load", "NF4 at load"])
def test_a_load_that_quantizes_holds_little_beside_what_it_makes(name: str, tmp_path: Path) -> None:
    (result,) = measure(tuple(case for case in CASES if case.name == name), tmp_path, Size(layers=3, hidden=1024, intermediate=2816))
    assert 20e6 < result.packed_bytes < 100e6
    assert result.ratio < 1.8


def test_every_case_can_be_converted(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", layers=1, hidden=256, intermediate=512)

    for case in CASES:
        if case.recipe is not None:
            plan = plan_conversion(str(tmp_path / "model"), ConvertOptions(recipe=case.recipe, format=case.container, overrides=case.overrides)).plan
            assert len(plan.layers) == 7 and not plan.needs_calibration
