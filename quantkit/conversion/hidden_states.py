"""The hidden states between two blocks, for all calibration rows: in memory, or in a file where they would take too much of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantkit.conversion.calibration import CalibrationSet
from quantkit.models.streaming import BlockRunner, Place

TOKENS_AT_ONCE = 8192
IN_MEMORY_BYTES = 4 << 30


class HiddenStates:
    """[rows, T, H], replaced block by block. Spilled states live in a mapped file, which the kernel writes out when memory is short."""

    def __init__(self, rows: CalibrationSet, width: int, dtype: torch.dtype, folder: Path, name: str, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.rows = rows
        shape = (*rows.input_ids.shape, width)
        size = torch.Size(shape).numel()
        self._file = folder / f"{name}.states" if size * dtype.itemsize > in_memory_bytes else None
        if self._file is None:
            self.states = torch.empty(shape, dtype=dtype)
        else:
            self.states = torch.from_file(str(self._file), shared=True, size=size, dtype=dtype).view(shape)

    def batches(self, runner: BlockRunner, index: int | None) -> list[Place]:
        """Rows of about TOKENS_AT_ONCE tokens, or single texts, for block `index` or the embedding (None)."""
        return runner.places(index, self.rows.position_ids, max(1, TOKENS_AT_ONCE // self.rows.input_ids.shape[1]))

    def embed(self, runner: BlockRunner) -> None:
        for batch in self.batches(runner, None):
            self.states[batch] = runner.embed(self.rows.input_ids[batch], self.rows.position_ids[batch])

    def advance(self, runner: BlockRunner, index: int) -> None:
        """Replace every row by what block `index`, with the weights it has now, makes of it."""
        for batch in self.batches(runner, index):
            self.states[batch] = self.through(runner, index, batch).to(self.states.device)

    def through(self, runner: BlockRunner, index: int, batch: Place) -> Tensor:
        return runner.block(index, self.states[batch], self.rows.input_ids[batch], self.rows.position_ids[batch])

    def close(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
