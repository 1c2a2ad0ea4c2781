from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantkit.bench.convert import Case, measure
from quantkit.bench.process import run
from quantkit.errors import QuantkitError


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_private_memory_counts_what_a_process_allocates() -> None:
    usage = run([sys.executable, "-c", "import time; block = bytearray(b'x') * 100_000_000; time.sleep(0.3)"])
    assert 100e6 < usage.peak_private < 130e6


def test_a_failed_command_is_reported_with_its_own_message() -> None:
    with pytest.raises(QuantkitError, match="no such luck"):
        run([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_a_case_is_converted_and_accounted_for(tmp_path: Path) -> None:
    (result,) = measure((Case("tiny", "w4a16-rtn", layers=2, hidden=128, intermediate=256),), tmp_path)
    assert result.source_bytes > 1_000_000
    assert result.usage.cpu_seconds > 0
    assert not list(tmp_path.iterdir())
