"""The checkpoints that a check file names, made anew each time: a fault in converting is what the check is to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import plan_conversion
from quantkit.report.check import CheckFile


def make_checkpoints(
    expected: CheckFile, folder: Path, *, device: str = "auto", trust_remote_code: bool = False, told: Callable[[str], None] | None = None
) -> list[str]:
    """Convert the file's source by each of its recipes, into folders of the checkpoints' names.

    Raises:
        QuantkitError: what `convert` raises.
    """
    settings = {"overwrite": True, "fresh": True, "measure": False, "device": device, "trust_remote_code": trust_remote_code}
    asked = {}
    for each in expected.checkpoints:
        rows = CalibrationOptions(num_samples=each.num_samples, seq_len=each.seq_len)
        asked[each.name] = ConvertOptions(recipe=each.recipe, format=each.format, calibration=rows, **settings)
    for options in asked.values():
        plan_conversion(expected.source, options)  # what cannot be converted is found before anything is
    for name, options in asked.items():
        if told is not None:
            told(f"{name}: convert")
        convert(expected.source, folder / name, options)
    return [str(folder / name) for name in asked]
