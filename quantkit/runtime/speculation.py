"""Guesses for the next tokens of running sequences: from their own text, or from a smaller model. What a guess is worth is decided elsewhere.

Guesses change how many tokens a step yields, never which tokens are likely: those from the text are held against what would have been sampled
anyway, those drawn by a model are taken or left by rejection sampling (arXiv 2211.17192). Where it is guessed is each sequence's own affair
(`draft_length`): where a step has no room for a guess that was due, its place is drawn against that guess all the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import UsageError
from quantkit.runtime.block_pool import BlockPool
from quantkit.runtime.decoders import Decoder
from quantkit.runtime.kv_cache import KVCache
from quantkit.runtime.loader import LoadedModel
from quantkit.runtime.logits import SampleRequest
from quantkit.runtime.options import EngineOptions
from quantkit.runtime.runner import Runner
from quantkit.runtime.sampler import Sampled, draft_uniform, probabilities
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.scheduler import Batch, Scheduler, SchedulerConfig
from quantkit.runtime.sequence import Sequence

LONGEST, SHORTEST = 4, 2
"""Lengths of the n-grams that are looked up, longest first."""


@dataclass(slots=True)
class Draft:
    """Guesses behind a sequence's tokens.

    Attributes:
        weights: what each was drawn from, float32 [V]; None where they were not drawn.
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[Tensor] | None = None


class Proposer(Protocol):
    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """One draft a sequence, of `num_guesses` guesses or fewer. The sequences stay as they are."""
        ...


class NGram:
    """Prompt lookup: what followed when the sequence's last tokens stood there before."""

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        return [Draft(look_up(sequence.tokens, sequence.num_guesses)) for sequence in sequences]


def look_up(tokens: Tokens[int], count: int) -> list[int]:
    """What followed the latest earlier place of the longest n-gram that ends the tokens; where the end is reached, the repetition goes on."""
    packed = array("q", tokens).tobytes()
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        at = _latest(packed, length * 8)
        if at is not None:
            text, distance = list(tokens), len(tokens) - length - at
            for _ in range(count):
                text.append(text[-distance])
            return text[len(tokens) :]
    return []


def _latest(packed: bytes, size: int) -> int | None:
    """Where the last `size` bytes stood before, in values of 8 bytes."""
    end = len(packed) - 1
    while (at := packed.rfind(packed[-size:], 0, end)) >= 0:
        if at % 8 == 0:
            return at // 8
        end = at + size - 1
    return None


class DraftModel:
    """A smaller model that draws guesses as the request would have the large one draw.

    Every proposal is a short request to a scheduler of its own, whose prefix cache holds what was computed for the last one. So nothing is kept of
    a sequence that could go stale when it is preempted, forked or cancelled, and at most a block of it is computed again.

    Args:
        decoder, cache: of this model, the cache for it alone.
        eos, width: the target's ends of text and number of logits.
    """

    def __init__(self, loaded: LoadedModel, decoder: Decoder, cache: KVCache, *, eos: frozenset[int], width: int, options: EngineOptions) -> None:
        self.eos, self.width = eos, width
        self.vocabulary = loaded.vocabulary
        limits = SchedulerConfig(options.max_tokens_per_step, options.max_sequences, None, loaded.context)
        self.scheduler = Scheduler(BlockPool(cache.num_blocks, cache.block_size), limits)
        self.runner = Runner(decoder, cache, limits)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        drafts = [Draft([], None if sequence.params.is_greedy else []) for sequence in sequences]
        tasks = [_Task(self._own(target), target, draft) for target, draft in zip(sequences, drafts, strict=True) if self._can_read(target)]
        try:
            for task in tasks:
                self.scheduler.add(task.own)
            while self.scheduler.has_work:
                self._step({task.own.id: task for task in tasks})
        finally:
            for task in tasks:
                self.scheduler.finish(task.own, "cancelled")
        return drafts

    def _own(self, target: Sequence) -> Sequence:
        return Sequence(target.id, list(target.tokens), SamplingParams(max_tokens=target.num_guesses), salt=target.salt)

    def _can_read(self, sequence: Sequence) -> bool:
        """Whether the text with all guesses of its run fits this model, and each of its tokens has an embedding here."""
        return len(sequence.tokens) + sequence.guessing.left <= self.scheduler.max_length and max(sequence.tokens) < self.vocabulary

    def _step(self, tasks: dict[str, _Task]) -> None:
        batch = self.scheduler.schedule()
        if not batch.pieces:
            return
        logits, wanted = self.runner.forward(batch)
        at_end = {each.piece.sequence.id: each.rows.stop - 1 for each in wanted if each.piece.reaches_end}
        drawn = dict(zip(at_end, self._draw(logits[list(at_end.values())], [tasks[name] for name in at_end]), strict=True))
        for piece in batch.pieces:
            name = piece.sequence.id
            token = drawn.get(name)
            self.scheduler.commit(piece, [] if token is None else [token])
            if name in drawn and (token is None or piece.sequence.num_output == piece.sequence.params.max_tokens):
                self.scheduler.finish(piece.sequence, "length")

    def _draw(self, logits: Tensor, tasks: list[_Task]) -> list[int | None]:
        """A guess for each row, kept in its draft; None where the logits are not sound."""
        if not tasks:
            return []
        logits = functional.pad(logits[:, : self.width], (0, max(0, self.width - logits.shape[1])), value=-torch.inf)
        requests = [task.request(self.eos) for task in tasks]
        weights = probabilities(logits, requests)
        ends = weights.double().cumsum(1)
        uniforms = [draft_uniform(request.seed, len(request.output)) for request in requests]
        wanted = torch.tensor(uniforms, dtype=torch.float64, device=ends.device)[:, None] * ends[:, -1:]
        tokens = torch.searchsorted(ends, wanted, right=True).clamp_(max=self.width - 1)[:, 0].tolist()
        sound = ends[:, -1].isfinite().tolist()
        for task, token, row, is_sound in zip(tasks, tokens, weights, sound, strict=True):
            if is_sound:
                task.draft.tokens.append(token)
                if task.draft.weights is not None:
                    task.draft.weights.append(row)
        return [token if is_sound else None for token, is_sound in zip(tokens, sound, strict=True)]


@dataclass(eq=False, slots=True)
class _Task:
    """Drawing one draft: the draft model's own sequence, which grows, and the target's, which stays."""

    own: Sequence
    target: Sequence
    draft: Draft

    def request(self, eos: frozenset[int]) -> SampleRequest:
        target = self.target
        return SampleRequest(target.params, target.prompt_view, self.own.tokens[target.num_prompt :], target.seed, eos)


def guess(proposer: Proposer, scheduler: Scheduler) -> dict[str, Draft]:
    """Give running sequences that want one token their guesses, as many as are due and a step has room for; the drafts by sequence."""
    for sequence in scheduler.running:
        sequence.draft = []
    ready = [sequence for sequence in scheduler.running if sequence.num_wanted == 1 and _is_due(sequence, scheduler)]
    spare = scheduler.config.max_tokens - sum(sequence.num_wanted for sequence in scheduler.running)
    share = max(0, min(spare // max(1, len(ready)), (scheduler.config.max_chunk or spare + 1) - 1))
    for sequence in ready:
        is_drawn = not sequence.params.is_greedy  # then the token behind the guesses is drawn against one too
        sequence.num_guesses = min(sequence.guessing.left, share + is_drawn)
    drafts = _propose(proposer, [sequence for sequence in ready if sequence.num_guesses])
    for sequence in ready:
        if sequence.id in drafts:
            sequence.draft = drafts[sequence.id].tokens[: min(share, sequence.guessing.left)]
    return drafts


def guess_behind(proposer: Proposer, scheduler: Scheduler, batch: Batch, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """One guess, not to be computed, for each sequence that is drawn from in this step, has one due and got none: it was preempted before."""
    found = [piece.sequence for piece in batch.pieces if piece.reaches_end and piece.sequence.id not in drafts]
    late = [sequence for sequence in found if not sequence.params.is_greedy and _is_due(sequence, scheduler)]
    for sequence in late:
        sequence.num_guesses = 1
    return _propose(proposer, late)


def settle(batch: Batch, drafts: Mapping[str, Draft], chosen: Mapping[str, Tokens[Sampled] | None]) -> None:
    """Tell the sequences how their guesses fared, before the tokens are committed."""
    for piece in batch.pieces:
        if piece.reaches_end:
            draft = drafts.get(piece.sequence.id)
            guesses = draft.tokens if draft is not None else []
            for token, guessed in zip_longest(chosen.get(piece.sequence.id) or (), guesses):
                if token is None:
                    break
                piece.sequence.guessing.take(None if guessed is None else token.token == guessed)


def _propose(proposer: Proposer, sequences: list[Sequence]) -> dict[str, Draft]:
    drafts = proposer.propose(sequences) if sequences else []
    return {sequence.id: draft for sequence, draft in zip(sequences, drafts, strict=True)}


def _is_due(sequence: Sequence, scheduler: Scheduler) -> bool:
    """Whether the next token's place is guessed; the first one's is not, and masks of a structure come one token at a time."""
    if not sequence.num_output or sequence.siblings or sequence.params.structure is not None:
        return False
    return sequence.guessing.decide(_may_follow(sequence, scheduler.max_length)) > 0


def _may_follow(sequence: Sequence, max_length: int) -> int:
    """Guesses that leave room for the token that comes with them."""
    return min(max_length - len(sequence.tokens), (sequence.params.max_tokens or max_length) - sequence.num_output) - 1


def require_same_tokens(target: LoadedModel, draft: LoadedModel, tokenizers: tuple[Any, Any]) -> None:
    """Raises UsageError, naming both, where token ids do not mean the same; without tokenizers to ask, the sizes must be equal."""
    vocabularies = [each.get_vocab() for each in tokenizers] if all(tokenizers) else [target.vocabulary, draft.vocabulary]
    if vocabularies[0] != vocabularies[1]:
        sizes = f"{draft.vocabulary:,} tokens against {target.vocabulary:,}"
        raise UsageError(f"{draft.name} cannot draft for {target.name}: their vocabularies differ ({sizes}); give a model with the same tokenizer")
