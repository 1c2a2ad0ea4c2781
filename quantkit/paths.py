"""Where the data that ships with quantkit lies: inside the package when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def packaged(kind: Literal["recipes", "evals"]) -> Path:
    """The folder of shipped recipes or evals. It is read, never written."""
    package = Path(__file__).resolve().parent
    installed = package / kind
    return installed if installed.is_dir() else package.parent / kind
