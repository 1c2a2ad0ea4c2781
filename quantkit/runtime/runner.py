"""One step's forward pass: the tokens of a batch side by side in one row, their places in the cache beside them, logits where they are wanted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.runtime.decoders import Decoder
from quantkit.runtime.elementwise import EvenElementwise
from quantkit.runtime.kv_cache import KVCache
from quantkit.runtime.scheduler import Batch, Piece, SchedulerConfig
from quantkit.runtime.step import StepContext, running


@dataclass(frozen=True, slots=True)
class Wanted:
    """The logits of a piece: of its last `count` tokens, which lie at `rows` of the step's logits."""

    piece: Piece
    rows: slice


class Runner:
    """Runs batches through one decoder over one cache.

    Args:
        is_even: a token's result must not depend on those beside it, to the last bit.

    The blocks of every running sequence stand in one table, a row for each slot of the scheduler; a step writes only what is new there.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, limits: SchedulerConfig, *, is_even: bool = False) -> None:
        self.decoder, self.cache, self._is_even = decoder, cache, is_even
        longest = min(cache.num_blocks, -(-limits.context // cache.block_size))
        self._tables = torch.zeros(limits.max_sequences, longest, dtype=torch.int32, device=cache.device)

    def forward(self, batch: Batch) -> tuple[Tensor, list[Wanted]]:
        """float32 logits [R, vocabulary] and whose they are.

        Of a piece that reaches its end: its last known token's, and those of guesses behind it; of one whose prompt's log-probabilities are
        wanted: all of those.
        """
        self.cache.copy_blocks(batch.copies)
        rows, wanted = [], []
        at = 0
        for piece in batch.pieces:
            wanted_from = piece.sequence.scored_from if piece.sequence.is_scored else piece.sequence.num_to_compute - 1
            first = at + max(0, wanted_from - piece.start)
            chosen = range(first, at + piece.count)
            if chosen:
                wanted.append(Wanted(piece, slice(len(rows), len(rows) + len(chosen))))
                rows += chosen
            at += piece.count
        device = self.cache.device
        ids = torch.tensor([token for piece in batch.pieces for token in piece.tokens], device=device)
        positions = torch.tensor([i for piece in batch.pieces for i in range(piece.start, piece.end)], device=device)
        even = EvenElementwise() if self._is_even else nullcontext()
        with torch.inference_mode(), running(self._context(batch, positions)), even:
            logits = self.decoder.logits(ids, positions, torch.tensor(rows or [0], device=device))
        return logits[: len(rows)], wanted

    def _adapters(self, batch: Batch) -> dict[str, Tensor]:
        rows: dict[str, list[int]] = {}
        at = 0
        for piece in batch.pieces:
            if piece.sequence.lora:
                rows.setdefault(piece.sequence.lora, []).extend(range(at, at + piece.count))
            at += piece.count
        return {name: torch.tensor(each, device=self.cache.device) for name, each in rows.items()}

    def _context(self, batch: Batch, positions: Tensor) -> StepContext:
        size, device = self.cache.block_size, self.cache.device
        rows, columns, blocks = [], [], []
        for piece in batch.pieces:
            sequence, first = piece.sequence, min(piece.sequence.num_tabled, piece.start // size)
            new = sequence.blocks[first:]
            rows += [sequence.slot] * len(new)
            columns += range(first, first + len(new))
            blocks += new
            sequence.num_tabled = len(sequence.blocks)
        changes = torch.tensor([rows, columns, blocks], device=device)
        self._tables[changes[0], changes[1]] = changes[2].int()
        owners = torch.tensor([slot for piece in batch.pieces for slot in [piece.sequence.slot] * piece.count], device=device)
        slots = self._tables[owners, positions // size].long() * size + positions % size
        return StepContext(self.cache, slots, self._tables, owners.int(), positions.int(), self._adapters(batch))
