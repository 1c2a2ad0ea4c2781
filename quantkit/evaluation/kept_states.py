"""A baseline's last hidden states, kept between runs, so that a second quantization of the same model does not pass over its original again.

Logits come of them by the model's own head, exactly; they are as much smaller on disk as the vocabulary is larger than the hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import torch

from quantkit.models.compare import TokenRows

_DAY = 24 * 3600
_log = logging.getLogger("quantkit")
MAX_BYTES = 8 << 30
"""Of all that is kept; the oldest go."""


def states_file(folder: Path, fingerprint: str, rows: TokenRows, dtype: torch.dtype) -> Path | None:
    """Where the states of a model on rows are kept; None where nothing can be, which is said.

    Args:
        fingerprint: of the model's configuration and weights.
        dtype: in which its blocks are computed.
    """
    digest = hashlib.sha256(f"{fingerprint} {dtype} {torch.__version__} {tuple(rows.input_ids.shape)}".encode())
    for part in (rows.input_ids, rows.position_ids):
        digest.update(part.contiguous().numpy().tobytes())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder)
    except OSError as error:
        _log.warning("the baseline's states cannot be kept in %s (%s); the next run computes them again", folder, error.strerror)
        return None
    return folder / f"{digest.hexdigest()[:24]}.safetensors"


def _make_room(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.stat().st_mtime < time.time() - _DAY:
            path.unlink(missing_ok=True)  # of a run that was killed
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
