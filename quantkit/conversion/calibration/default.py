"""The mix that ships with quantkit: what a model is calibrated on when nothing is said."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import CalibrationError
from quantkit.paths import packaged

DEFAULT_NAME = "the built-in mix"


def default_path() -> Path:
    """The file of the mix; its origins and licences stand in the README beside it."""
    path = packaged("recipes") / "calibration" / "mix.jsonl.gz"
    if not path.is_file():
        raise CalibrationError(f"the built-in calibration mix is missing from this installation ({path}); reinstall quantkit or name a source")
    return path
