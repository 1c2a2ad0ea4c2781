"""Calibration rows that are tokens already: a safetensors file with `input_ids` int64 [rows, T], so that tools can be compared on equal tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from quantkit.conversion.calibration import CalibrationOptions, CalibrationReport, CalibrationSet
from quantkit.errors import CalibrationError
from quantkit.models.architecture import Architecture


def load_token_file(path: Path, options: CalibrationOptions, architecture: Architecture) -> CalibrationSet:
    """The first `num_samples` rows, or all where there are fewer. Every row is one text without padding.

    Raises:
        CalibrationError: there is no such file or tensor, a row is too short or too long, or a token is not in the vocabulary.
    """
    if not path.is_file():
        raise CalibrationError(f"no calibration file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ids = file.get_tensor("input_ids") if "input_ids" in names else None
    except SafetensorError as error:
        raise CalibrationError(f"{path} is no safetensors file: {error}") from error
    if ids is None or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(f"{path} has no integer tensor input_ids [rows, tokens]; it holds {', '.join(names) or 'nothing'}")
    vocabulary = int(architecture.config.get_text_config().vocab_size)
    if not 2 <= ids.shape[1] <= architecture.context:
        raise CalibrationError(f"{path} has rows of {ids.shape[1]} tokens; the model takes 2 to {architecture.context}")
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise CalibrationError(f"{path} holds tokens outside the model's vocabulary of {vocabulary}; it was made with another tokenizer")
    ids = ids[: options.num_samples].long()
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    report = CalibrationReport(source=str(path), num_documents=len(ids), num_tokens=ids.numel(), rows=len(ids), seq_len=ids.shape[1])
    return CalibrationSet(ids, positions, torch.ones_like(ids, dtype=torch.bool), report)
