"""What runs in the next step: one budget of tokens, and in every sequence the computed tokens catch up with the known ones.

There are no phases: a long prompt takes what the budget leaves and goes on in the next step, beside sequences that need one token each. When
blocks run out, the last in order gives its own back and is computed again later. Pure Python: needs no device and no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from quantkit.errors import BusyError, RequestError, TooLongError
from quantkit.runtime.block_pool import BlockPool
from quantkit.runtime.sequence import FinishReason, Sequence
from quantkit.runtime.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step.

    Attributes:
        max_tokens: tokens computed in one step over all sequences.
        max_sequences: sequences that hold blocks at once.
        max_chunk: tokens of one sequence in one step; None for the whole budget.
        context: tokens a sequence may have in all.
        max_waiting: requests that may queue; None for no bound.
        max_scored: tokens of prompts whose log-probabilities are wanted, in one step over all sequences: each takes a row of the vocabulary.
    """

    max_tokens: int = 2048
    max_sequences: int = 256
    max_chunk: int | None = None
    context: int = 1 << 20
    max_waiting: int | None = None
    max_scored: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of a sequence's known and guessed ones, to be computed in this step.

    Attributes:
        reaches_end: whether every known token is computed after this piece, so that the next one can be chosen.
        tokens: known ones, and `guesses` behind them those of the sequence's guesses that are computed with it.
        num_scored: tokens whose log-probabilities are wanted: each takes a row of logits.
    """

    sequence: Sequence
    start: int
    count: int
    end: int
    reaches_end: bool
    tokens: list[int]
    guesses: list[int]
    num_scored: int

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Piece:
        """The next tokens that a sequence has not computed."""
        start, known = sequence.num_computed, sequence.tokens
        end = start + count
        guesses = sequence.draft[: max(0, end - len(known))] if sequence.draft else []
        num_scored = max(0, end - max(start, sequence.scored_from)) if sequence.is_scored else 0
        return cls(sequence, start, count, end, end >= sequence.num_to_compute, known[start:end] + guesses, guesses, num_scored)


@dataclass(slots=True)
class Batch:
    """One step's work.

    Attributes:
        copies: (from, to) blocks to be copied before anything is written, for continuations that stop sharing one.
        preempted: sequences that lost their blocks in this step.
    """

    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(piece.count for piece in self.pieces)


class Scheduler:
    """Owns every sequence that is not finished, and the pool of blocks."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig | None = None, *, aging: int = 1000) -> None:
        self.pool, self.config = pool, config or SchedulerConfig()
        self.waiting = WaitingQueue(aging=aging)
        self.running: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self._arrivals = 0
        self._slots = list(range(self.config.max_sequences))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, with its siblings behind it.

        Raises:
            RequestError: it could never run, whatever else ends; of its kinds, TooLongError for its length and BusyError for a full queue.
        """
        self._require_fits(sequence)
        if self.config.max_waiting is not None and len(self.waiting) >= self.config.max_waiting:
            raise BusyError(f"{len(self.waiting)} requests are waiting already, and the queue takes {self.config.max_waiting}; try again later")
        for each in (sequence, *sequence.siblings):
            each.arrival, each.arrived_at = self._arrivals, self.step
            self._arrivals += 1
        self.waiting.push(sequence)

    def schedule(self) -> Batch:
        """The next step's work; empty when there is nothing to do."""
        self.step += 1
        batch = Batch()
        budget = self.config.max_tokens
        self.running.sort(key=_order)
        for sequence in list(self.running):
            if budget <= 0:
                break
            if sequence.is_running:  # else one before it took its blocks
                budget -= self._schedule_running(sequence, budget, batch)
        if not batch.preempted:
            self._admit(budget, batch)
        return batch

    def commit(self, piece: Piece, tokens: list[int]) -> list[Sequence]:
        """A piece was computed and these tokens chosen behind it (none while the prompt is not whole; with guesses, those that held and one more).

        Returns:
            the siblings that forked off and want their own first token from the same logits.
        """
        sequence = piece.sequence
        if sequence.is_finished:
            return []
        sequence.draft = []
        if piece.reaches_end and tokens:
            sequence.num_computed = len(sequence.tokens) + len(tokens) - 1
            sequence.tokens += tokens
        else:
            sequence.num_computed = min(piece.end, len(sequence.tokens))
        self.waiting.serve(sequence.tenant, piece.count)
        self._remember(sequence)
        return self._fork(sequence) if sequence.siblings and piece.reaches_end else []

    def give_back(self, batch: Batch) -> None:
        """A batch was not computed: its sequences wait again and are computed from their beginnings."""
        for piece in batch.pieces:
            if piece.sequence.is_running:
                self._preempt(piece.sequence, batch)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is, and its siblings that have not forked yet with it where it is cancelled or failed."""
        if sequence.is_finished:
            return
        sequence.finish_reason = reason
        if not self.waiting.remove(sequence):
            self._leave(sequence)
        for sibling in sequence.siblings:
            sibling.finish_reason = reason
        sequence.siblings = []

    @property
    def max_length(self) -> int:
        """Tokens, prompt and output, that a sequence can reach."""
        return min(self.config.context, len(self.pool) * self.pool.block_size)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def _require_fits(self, sequence: Sequence) -> None:
        if not sequence.tokens:
            raise RequestError("the prompt is empty; give at least one token")
        if sequence.is_only_scored and sequence.num_prompt < 2:
            raise RequestError("max_tokens is 0 and the prompt has one token, so there is nothing to score; give at least two")
        longest = self._longest(sequence)
        wants = f"{sequence.num_prompt} tokens of prompt and {sequence.params.max_tokens or 0} to generate"
        if longest > self.config.context:
            raise TooLongError(f"{wants} are more than the context of {self.config.context}; shorten the prompt or lower max_tokens")
        continuations = 1 + len(sequence.siblings)
        if continuations > self.config.max_sequences:
            raise RequestError(f"n is {continuations}, and {self.config.max_sequences} sequences run at once; lower n")
        room = len(self.pool)
        if self.pool.num_blocks_for(longest) > room:
            size = f"{room} blocks of {self.pool.block_size}"
            raise TooLongError(f"{wants} never fit the KV cache of {size}; shorten the prompt, lower max_tokens or enlarge the cache")

    def _longest(self, sequence: Sequence) -> int:
        """Tokens it may come to hold in the cache."""
        wanted = sequence.params.max_tokens
        return sequence.num_prompt + (1 if wanted is None else wanted or -1)

    def _schedule_running(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        count = self._chunk(sequence, budget, batch)
        if count == 0:
            return 0
        while not self._allocate(sequence, count, batch):
            if sequence.draft:  # guesses push nobody out
                sequence.draft = []
                count = self._chunk(sequence, budget, batch)
                continue
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is sequence:
                return 0
        batch.pieces.append(Piece.of(sequence, count))
        return count

    def _admit(self, budget: int, batch: Batch) -> None:
        """Start waiting sequences in their order while the budget, the places and the blocks for their whole prompts last."""
        while budget > 0 and (sequence := self.waiting.head(self.step)) is not None:
            if len(self.running) + 1 + len(sequence.siblings) + self._expected() > self.config.max_sequences:
                break
            if self._chunk(sequence, budget, batch) == 0:
                break
            prefix = self._find_prefix(sequence)
            for block in prefix:
                self.pool.hold(block)
            if self.pool.num_idle < self.pool.num_blocks_for(len(sequence.tokens)) - len(prefix):
                self.pool.free(prefix)
                break
            self.waiting.pop(sequence)
            sequence.blocks, sequence.num_computed = prefix, len(prefix) * self.pool.block_size
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
            sequence.num_remembered = len(prefix)
            self._run(sequence)
            count = self._chunk(sequence, budget, batch)
            allocated = self._allocate(sequence, count, batch)
            assert allocated
            batch.pieces.append(Piece.of(sequence, count))
            budget -= count

    def _expected(self) -> int:
        """Places that siblings of running sequences will take."""
        return sum(len(s.siblings) for s in self.running)

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """How many of its tokens the step takes; 0 where a prompt is to be scored and the step has scored as many as it may."""
        count = min(sequence.num_wanted, budget, self.config.max_chunk or budget)
        if not sequence.is_scored:
            return count
        room = self.config.max_scored - sum(piece.num_scored for piece in batch.pieces)
        return min(count, max(0, sequence.scored_from - sequence.num_computed) + max(0, room))

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's beginning; the last token is always computed, as its logits are wanted."""
        size, found = self.pool.block_size, []
        for number in range(sequence.num_cacheable // size):
            block = self.pool.find(sequence.key_of(number, size), sequence.tokens[number * size : (number + 1) * size])
            if block is None:
                break
            found.append(block)
        return found

    def _allocate(self, sequence: Sequence, count: int, batch: Batch) -> bool:
        """Blocks for `count` more tokens, none of them shared where they will be written; False when there are too few."""
        first = sequence.num_computed // self.pool.block_size
        wanted = self.pool.num_blocks_for(sequence.num_computed + count)
        shared = [at for at in range(first, min(len(sequence.blocks), wanted)) if self.pool.is_shared(sequence.blocks[at])]
        if self.pool.num_idle < max(0, wanted - len(sequence.blocks)) + len(shared):
            return False
        for at in shared:
            own = self.pool.allocate()
            assert own is not None
            batch.copies.append((sequence.blocks[at], own))
            self.pool.free([sequence.blocks[at]])
            sequence.blocks[at] = own
        while len(sequence.blocks) < wanted:
            block = self.pool.allocate()
            assert block is not None
            sequence.blocks.append(block)
        return True

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        self._leave(sequence)
        sequence.num_computed = sequence.num_remembered = 0
        sequence.draft = []
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        batch.preempted.append(sequence)
        self.waiting.push(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.is_running = True
        sequence.slot, sequence.num_tabled = self._slots.pop(), 0
        self.running.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.is_running:
            sequence.is_running = False
            self._slots.append(sequence.slot)
            self.running.remove(sequence)
            self.waiting.left(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = []

    def _remember(self, sequence: Sequence) -> None:
        """Let every block that is full and computed be found."""
        size = self.pool.block_size
        for number in range(sequence.num_remembered, sequence.num_computed // size):
            tokens = sequence.tokens[number * size : (number + 1) * size]
            self.pool.remember(sequence.blocks[number], sequence.key_of(number, size), tokens)
        sequence.num_remembered = sequence.num_computed // size

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """Let the siblings share everything computed for the prompt."""
        forked, parent.siblings = [s for s in parent.siblings if not s.is_finished], []
        for sibling in forked:
            sibling.blocks, sibling.num_computed = list(parent.blocks), parent.num_computed
            sibling.num_cached, sibling.level, sibling.num_remembered = parent.num_cached, parent.level, parent.num_remembered
            for block in sibling.blocks:
                self.pool.hold(block)
            self._run(sibling)
            self.waiting.joined(sibling)
        return forked


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.level, sequence.arrival
