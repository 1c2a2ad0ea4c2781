"""The mix that ships with quantkit: what a model is calibrated on when nothing is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.paths import packaged

DEFAULT_NAME = "the built-in mix"
_ONE_IN = 16


def default_path() -> Path:
    """The file of the mix; its origins and licences stand in the README beside it."""
    path = packaged("recipes") / "calibration" / "mix.jsonl.gz"
    if not path.is_file():
        raise CalibrationError(f"the built-in calibration mix is missing from this installation ({path}); reinstall quantkit or name a source")
    return path


def is_held_out(record: dict[str, Any]) -> bool:
    """Whether a document of the mix is kept to measure on: about one in 16, by its content, so that no seed calibrates on it."""
    content = json.dumps(record.get("text") or record.get("messages"), sort_keys=True)
    return hashlib.sha256(content.encode()).digest()[0] % _ONE_IN == 0
