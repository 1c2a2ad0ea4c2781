"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
from pathlib import Path
from quantkit.allocator import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

pieces = [bytearray(50_000) for _ in range(2000)]
kept = pieces[::100]
before = resident()
del pieces
give_back()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux alone is asked")
def test_pieces_between_others_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)

    assert int(done.stdout) > 50_000_000
