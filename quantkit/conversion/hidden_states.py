"""The hidden states between two blocks, for all calibration rows: in memory, or in a file where they would take too much of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors
from quantkit.conversion.calibration import CalibrationSet
from quantkit.models.streaming import BlockRunner, Place

TOKENS_AT_ONCE = {"cpu": 2048, "gpu": 8192}
"""What a CPU's caches hold is faster: stories3m took 15% longer at 8192."""
IN_MEMORY_BYTES = 4 << 30

Watching = Callable[[Tensor], AbstractContextManager[None]]


def spilled_bytes(num_tokens: int, width: int, dtype: torch.dtype) -> int:
    """The size of the file that this many hidden states live in, 0 where they stay in memory."""
    size = num_tokens * width * dtype.itemsize
    return size if size > IN_MEMORY_BYTES else 0


class HiddenStates:
    """[rows, T, H], replaced block by block. Spilled states live in a mapped file, which the kernel writes out when memory is short.

    Raises:
        OutputError: the disk has no room for the file.
    """

    def __init__(self, rows: CalibrationSet, width: int, dtype: torch.dtype, folder: Path, name: str) -> None:
        self.rows = rows
        shape = (*rows.input_ids.shape, width)
        self.states = room_for(shape, dtype, folder, name)

    def batches(self, runner: BlockRunner, index: int | None) -> list[Place]:
        """A few rows, or single texts, for block `index` or the embedding (None)."""
        at_once = TOKENS_AT_ONCE["cpu" if runner.device.type == "cpu" else "gpu"]
        return runner.places(index, self.rows.position_ids, max(1, at_once // self.rows.input_ids.shape[1]))

    def embed(self, runner: BlockRunner) -> None:
        for batch in self.batches(runner, None):
            self.states[batch] = runner.embed(self.rows.input_ids[batch], self.rows.position_ids[batch])

    def advance(self, runner: BlockRunner, index: int, watching: Watching | None = None) -> None:
        """Replace every row by what block `index`, with the weights it has now, makes of it.

        Args:
            watching: given what of a batch is no padding, bool [B, T]; its body is the batch's forward pass.
        """
        for batch in self.batches(runner, index):
            with nullcontext() if watching is None else watching(self.rows.valid[batch]):
                self.states[batch] = self.through(runner, index, batch).to(self.states.device)

    def through(self, runner: BlockRunner, index: int, batch: Place) -> Tensor:
        return runner.block(index, self.states[batch], self.rows.input_ids[batch], self.rows.position_ids[batch])


def room_for(shape: tuple[int, ...], dtype: torch.dtype, folder: Path, name: str) -> Tensor:
    """A tensor for hidden states, without values; raises OutputError where it must be a file and the disk has no room for it."""
    num_bytes = spilled_bytes(prod(shape[:-1]), shape[-1], dtype)
    return _mapped(folder / f"{name}.states", num_bytes, dtype).view(shape) if num_bytes else torch.empty(shape, dtype=dtype)


def _mapped(path: Path, num_bytes: int, dtype: torch.dtype) -> Tensor:
    """A file in memory, without a name, so that it is gone with the process however that ends.

    Its blocks are taken beforehand: a write to a map that finds none kills the process.
    """
    with disk_errors(path):
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_file(str(path), shared=True, size=num_bytes // dtype.itemsize, dtype=dtype)
        finally:
            path.unlink(missing_ok=True)
