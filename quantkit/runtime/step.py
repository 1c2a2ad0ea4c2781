"""What a step's tokens need beside their hidden states, put where attention and adapters find it while the model's own code runs.

Each thread has its own, as engines may run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.runtime.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where the tokens of a step lie, and which of them take an adapter.

    Attributes:
        slots: int64 [T], where each token's keys and values go.
        tables: int32 [S, max_blocks].
        sequence, position: int32 [T].
        adapters: int64 indices into the tokens, by the adapter's name.
    """

    cache: KVCache
    slots: Tensor
    tables: Tensor
    sequence: Tensor
    position: Tensor
    adapters: Mapping[str, Tensor]


class _Current(threading.local):
    context: Any = None


_current = _Current()


@contextmanager
def running(context: Any) -> Iterator[None]:
    """What runs within the body belongs to this step (a StepContext), or to something that looks on in its place."""
    _current.context = context
    try:
        yield
    finally:
        _current.context = None


def current() -> Any:
    """The step that runs in this thread; None outside of any."""
    return _current.context
