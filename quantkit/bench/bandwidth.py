"""How fast this machine reads memory: what bounds the tokens a second of one request, as each token reads every weight once."""

from __future__ import annotations

import time

import torch

_BYTES = 512 << 20
_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second, the best of some passes over more memory than any cache holds; takes a second on a slow machine."""
    values = torch.ones(_BYTES // 4, device=device)
    best = 0.0
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        values.sum()
        _wait(device)
        best = max(best, _BYTES / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
