"""The token rows of a conversion: those that calibrate, and behind them those held out to measure on."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantkit.conversion.calibration import CalibrationSet, load_calibration
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import Prepared
from quantkit.conversion.token_file import load_token_file
from quantkit.errors import SourceError
from quantkit.models.tokenizer import load_tokenizer

MAX_HELD_OUT = 16


def load_rows(prepared: Prepared) -> CalibrationSet:
    """The calibration rows, with the rows to be held out behind them."""
    wanted = prepared.options.calibration
    extra = num_held_out(wanted.num_samples) if prepared.options.measure else 0
    more = replace(wanted, num_samples=wanted.num_samples + extra)
    if wanted.is_tokens:
        return load_token_file(Path(str(wanted.source)), more, prepared.architecture)
    tokenizer = load_tokenizer(prepared.origin.folder, trust_remote_code=prepared.options.trust_remote_code)
    rows = load_calibration(more, tokenizer, context=prepared.architecture.context)
    vocabulary = int(prepared.architecture.config.get_text_config().vocab_size)
    if int(rows.input_ids.max()) >= vocabulary:
        raise SourceError(
            f"the tokenizer in {prepared.origin.folder} makes token {int(rows.input_ids.max())}, and the model's vocabulary has {vocabulary}; "
            "put the model's own tokenizer files there"
        )
    return rows


def split_rows(rows: CalibrationSet, options: ConvertOptions) -> tuple[CalibrationSet, CalibrationSet | None]:
    """Those to calibrate on and those to measure on; data that ends early is shared between the two in the same proportion."""
    there = len(rows.input_ids)
    held = num_held_out(min(options.calibration.num_samples, there))
    return rows.split(held) if options.measure and there > 1 else (rows, None)


def num_held_out(num_samples: int) -> int:
    """Rows to measure on beside this many to calibrate on."""
    return max(1, min(MAX_HELD_OUT, num_samples // 8))


def account(rows: CalibrationSet, options: ConvertOptions) -> str:
    """In words."""
    calibration, held_out = split_rows(rows, options)
    seed = "" if options.calibration.is_tokens else f"; seed {options.calibration.seed}"
    return calibration.report.summary() + seed + (f"; held out to measure on: {len(held_out.input_ids)} more" if held_out else "")


def figures(rows: CalibrationSet, options: ConvertOptions) -> dict[str, Any]:
    """The same as JSON values."""
    calibration, held_out = split_rows(rows, options)
    wanted = options.calibration
    chosen = {"seed": None, "layout": None} if wanted.is_tokens else {"seed": wanted.seed, "layout": wanted.layout}
    held = {"held_out_rows": held_out.report.rows, "held_out_tokens": held_out.report.num_tokens} if held_out else {}
    return asdict(calibration.report) | chosen | {"held_out_rows": 0, "held_out_tokens": 0} | held
