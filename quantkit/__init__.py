"""Make a Hugging Face language model small, prove what that cost, and run it.

`convert` writes a quantized checkpoint, `inspect` says what a checkpoint is, `LLM` runs it. Importing this loads no torch; calling does.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.conversion.report import ConversionReport
    from quantkit.formats.summary import Summary
    from quantkit.runtime.llm import LLM
    from quantkit.runtime.sampling_params import SamplingParams
    from quantkit.runtime.structure import Structure

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "Structure", "__version__", "convert", "inspect"]  # the capitals are loaded when asked for
_LAZY = {"LLM": "quantkit.runtime.llm", "SamplingParams": "quantkit.runtime.sampling_params", "Structure": "quantkit.runtime.structure"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def convert(source: str | PathLike[str], out: str | PathLike[str], **options: Any) -> ConversionReport:
    """Quantize a model and write it to a new folder.

    Args:
        source: folder, hub id, `modelscope:org/name`, or "reference".
        out: the folder to write.
        options: recipe, format, calib (a path or data set), num_samples, seq_len, group_size, overrides, ignore, max_shard_size (bytes, or "5GB"),
            dtype (a name, or torch's type), and the other fields of quantkit.conversion.options.ConvertOptions and
            quantkit.conversion.calibration.CalibrationOptions.

    Raises:
        quantkit.errors.QuantkitError: with nothing lost; the same call goes on with an unfinished run.
    """
    from dataclasses import fields

    from quantkit.conversion.calibration import CalibrationOptions
    from quantkit.conversion.convert import convert as run
    from quantkit.conversion.options import ConvertOptions
    from quantkit.errors import UsageError, did_you_mean

    options = {name: _as_typed(name, value) for name, value in options.items()}
    if "calib" in options:
        options["source"] = options.pop("calib")
        if not isinstance(options["source"], str | None):
            raise UsageError(f"calib is {options['source']!r}; give a path or the name of a data set, or None for the built-in mix")
    source, out = _as_typed("source", source), _as_typed("out", out)
    for name, value in (("source", source), ("out", out)):
        if not isinstance(value, str):
            raise UsageError(f"{name} is {value!r}; give a path or a name")
    data = {f.name for f in fields(CalibrationOptions)}
    own = {f.name for f in fields(ConvertOptions)} - {"calibration"}
    for name in options:
        if name not in data | own:
            raise UsageError(f"convert has no option {name!r}; {did_you_mean(name, data - {'source'} | own | {'calib'})}")
    calibration = CalibrationOptions(**{k: v for k, v in options.items() if k in data})
    return run(source, out, ConvertOptions(calibration=calibration, **{k: v for k, v in options.items() if k in own}))


def _as_typed(name: str, value: Any) -> Any:
    """A value as the command line has it: a path or torch's type by its name, a size in bytes."""
    from quantkit.given import size_in_bytes

    if isinstance(value, PathLike):
        return fspath(value)
    if name == "max_shard_size" and isinstance(value, str):
        return size_in_bytes(value)
    return str(value).removeprefix("torch.") if name == "dtype" and str(value).startswith("torch.") else value


def inspect(path: str) -> Summary:
    """What a checkpoint is: layers, schemes, bits per weight, bytes, and which engines load it.

    Args:
        path: folder, GGUF file, hub id, `modelscope:org/name`, or "reference".

    Raises:
        quantkit.errors.QuantkitError: there is no such checkpoint, or a file of it is damaged.
    """
    from pathlib import Path

    from quantkit.checkpoint.source import resolve
    from quantkit.formats.summary import summarize

    file = Path(path).expanduser()
    has_gguf = file.suffix == ".gguf" and file.is_file()
    return summarize(file if has_gguf else resolve(str(path)).folder)
