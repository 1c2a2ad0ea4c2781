"""Where the data that ships with quantkit lies, inside the package when installed, beside it in a checkout; and where it keeps what it found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def packaged(kind: Literal["recipes", "evals"]) -> Path:
    """The folder of shipped recipes or evals. It is read, never written."""
    package = Path(__file__).resolve().parent
    installed = package / kind
    return installed if installed.is_dir() else package.parent / kind


def cache_folder(kind: Literal["answers", "states"]) -> Path:
    """QUANTKIT_CACHE, or quantkit's folder among the user's caches."""
    base = os.environ.get("QUANTKIT_CACHE")
    return (Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "quantkit").expanduser() / kind
