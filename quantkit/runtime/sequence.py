"""One continuation of one prompt, from the queue to its last token."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from quantkit.runtime.block_pool import next_key, root_key
from quantkit.runtime.draft_length import DraftLength
from quantkit.runtime.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenView(Tokens[int]):
    """Part of a list that only grows."""

    __slots__ = ("_start", "_stop", "_tokens")

    def __init__(self, tokens: list[int], start: int, stop: int) -> None:
        self._tokens, self._start, self._stop = tokens, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[self._start : self._stop][index]

    def __iter__(self) -> Iterator[int]:
        return islice(self._tokens, self._start, self._stop)


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens known, tokens computed, and the blocks that hold what was computed.

    Attributes:
        tokens: prompt and output.
        num_prompt: how many of them are the prompt.
        priority: lower goes first.
        tenant: those who share the engine fairly.
        salt: prefixes are shared among equal salts only.
        lora: the adapter that its tokens take, or "" for none; prefixes are shared within one.
        siblings: continuations of the same prompt (`n` > 1) that fork off once it is computed.
        num_computed: tokens whose keys and values lie in `blocks`.
        num_cached: tokens of the prompt that were found in the cache at the first admission.
        draft: guessed tokens behind `tokens`, to be verified in the next step.
        guessing: how many are guessed, by how its guesses fared; num_guesses as many as the next draft is to have.
        seed: decides its draws, together with the place of the token drawn.
        level: the priority it was admitted with, which waiting has raised.
        arrival: order of arrival, and arrived_at the step of it.
        num_remembered: its first blocks that the pool has been told of.
        is_only_scored: nothing is generated, so nobody wants what stands behind its last token, which is not computed.
        slot: its row among the running sequences, and num_tabled its blocks that are written there.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    lora: str = ""
    seed: int = 0
    siblings: list[Sequence] = field(default_factory=list)
    num_prompt: int = 0
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    draft: list[int] = field(default_factory=list)
    guessing: DraftLength = field(default_factory=DraftLength)
    num_guesses: int = 0
    level: int = 0
    arrival: int = 0
    arrived_at: int = 0
    finish_reason: FinishReason | None = None
    is_running: bool = False
    num_remembered: int = 0
    slot: int = 0
    num_tabled: int = 0
    is_only_scored: bool = False
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)
        self.is_only_scored = self.params.max_tokens == 0

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def prompt_view(self) -> TokenView:
        """The prompt without a copy."""
        return TokenView(self.tokens, 0, self.num_prompt)

    @property
    def output_view(self) -> TokenView:
        """The output so far without a copy."""
        return TokenView(self.tokens, self.num_prompt, len(self.tokens))

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Tokens that are computed before the next one can be chosen, or before all are scored."""
        return len(self.tokens) - self.is_only_scored

    @property
    def num_wanted(self) -> int:
        """Tokens still to be computed, guesses included."""
        return self.num_to_compute + len(self.draft) - self.num_computed

    @property
    def scored_from(self) -> int:
        """The first position whose logits are wanted: the one before the first token of the prompt to be scored; the last where none is."""
        last = self.num_prompt - 1 - self.is_only_scored
        return last if self.params.prompt_logprobs is None else min(self.params.prompt_logprobs_from - 1, last)

    @property
    def num_cacheable(self) -> int:
        """Tokens of its beginning that need not be computed where they are cached: nobody wants the logits behind them."""
        return min(self.num_to_compute - 1, self.scored_from if self.params.prompt_logprobs is not None else len(self.tokens))

    @property
    def is_scored(self) -> bool:
        """Whether tokens that are computed now want their log-probabilities."""
        return self.params.prompt_logprobs is not None and self.num_computed < self.num_prompt

    def key_of(self, block: int, block_size: int) -> bytes:
        """The key of the full block of this number in the sequence; tokens never change, so keys are kept."""
        while len(self._keys) <= block:
            at = len(self._keys)
            before = self._keys[-1] if self._keys else root_key(f"{len(self.lora)} {self.lora}{self.salt}")
            self._keys.append(next_key(before, self.tokens[at * block_size : (at + 1) * block_size]))
        return self._keys[block]
