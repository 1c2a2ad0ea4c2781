"""Memory that was freed, given back to the system: the C library keeps it otherwise, in pieces that the next one does not fit."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Costs milliseconds. Does nothing where the C library is not GNU's."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
