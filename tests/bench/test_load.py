from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantkit.bench.load import Case, Size, measure


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_load_holds_little_beside_the_packed_model_and_its_cache(tmp_path: Path) -> None:
    """A quarter more at full size; here the layers are a larger part of the model."""
    (result,) = measure((Case("small", "w4a16-rtn", mode="exact"),), tmp_path, Size(layers=6, hidden=1024, intermediate=2816))
    assert 20e6 < result.packed_bytes < 60e6
    assert result.ratio < 1.6
    assert not list(tmp_path.iterdir())
