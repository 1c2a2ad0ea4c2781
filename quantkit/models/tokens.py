"""Tokens made elsewhere: a safetensors file with `input_ids` [rows, T], so that tools can be compared on equal tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import UsageError


def read_tokens(path: Path, *, vocabulary: int, context: int) -> Tensor:
    """All rows, int64 [rows, T].

    Raises:
        UsageError: there is no such file or tensor, there are no rows, or they do not fit the model.
    """
    if not path.is_file():
        raise UsageError(f"no token file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ids = file.get_tensor("input_ids") if "input_ids" in names else None
    except SafetensorError as error:
        raise UsageError(f"{path} is no safetensors file: {error}") from error
    if ids is None or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"{path} has no integer tensor input_ids [rows, tokens]; it holds {', '.join(names) or 'nothing'}")
    if not len(ids):
        raise UsageError(f"{path} has no rows")
    if not 2 <= ids.shape[1] <= context:
        raise UsageError(f"{path} has {len(ids)} rows of {ids.shape[1]} tokens; the model takes 2 to {context}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UsageError(f"{path} holds tokens outside the model's vocabulary of {vocabulary}; it was made with another tokenizer")
    return ids.long()
