"""The checkpoints that a check file names, made anew each time: a fault in converting is what the check is to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.report.check import CheckFile


def make_checkpoints(
    expected: CheckFile, folder: Path, *, device: str = "auto", trust_remote_code: bool = False, told: Callable[[str], None] | None = None
) -> list[str]:
    """Convert the file's source by each of its recipes, into folders of the checkpoints' names.

    Raises:
        QuantkitError: what `convert` raises.
    """
    made = []
    for each in expected.checkpoints:
        if told is not None:
            told(f"{each.name}: convert")
        rows = CalibrationOptions(num_samples=each.num_samples, seq_len=each.seq_len)
        options = ConvertOptions(
            recipe=each.recipe, format=each.format, calibration=rows, overwrite=True, fresh=True, measure=False, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        convert(expected.source, folder / each.name, options)
        made.append(str(folder / each.name))
    return made
