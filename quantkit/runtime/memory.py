"""Freed memory back to the system: glibc keeps what lies between blocks that are still in use, which after a load is as much as a model."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Where the C library is not glibc, it is left to itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
