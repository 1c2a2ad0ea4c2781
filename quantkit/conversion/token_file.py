"""Calibration rows that are tokens already: a safetensors file with `input_ids` int64 [rows, T], so that tools can be compared on equal tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.conversion.calibration import CalibrationOptions, CalibrationReport, CalibrationSet
from quantkit.errors import CalibrationError, UsageError
from quantkit.models.architecture import Architecture
from quantkit.models.tokens import read_tokens


def load_token_file(path: Path, options: CalibrationOptions, architecture: Architecture) -> CalibrationSet:
    """The first `num_samples` rows, or all where there are fewer. Every row is one text without padding.

    Raises:
        CalibrationError: there is no such file or tensor, a row is too short or too long, or a token is not in the vocabulary.
    """
    try:
        ids = read_tokens(path, vocabulary=int(architecture.config.get_text_config().vocab_size), context=architecture.context)
    except UsageError as error:
        raise CalibrationError(str(error)) from error
    ids = ids[: options.num_samples]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    report = CalibrationReport(source=str(path), num_documents=len(ids), num_tokens=ids.numel(), rows=len(ids), seq_len=ids.shape[1])
    return CalibrationSet(ids, positions, torch.ones_like(ids, dtype=torch.bool), report)
