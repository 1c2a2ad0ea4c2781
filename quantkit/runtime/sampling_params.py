"""What a request may ask of sampling. An invalid one cannot exist; what depends on the model is checked at admission."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from quantkit.errors import RequestError
from quantkit.runtime.structure import Structure

MAX_LOGPROBS = 100
MAX_STOPS = 32
MAX_N = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Defaults sample from the model's own distribution.

    Attributes:
        max_tokens: tokens to generate at most; None for as many as the context holds; 0 only scores the prompt, which prompt_logprobs asks for.
        min_tokens: no end of text and no stop before so many tokens.
        temperature: 0 for the most likely token always.
        top_k: choose among the k most likely tokens; 0 for all.
        top_p: choose among the most likely tokens whose probabilities reach p together.
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        typical_p: choose among the tokens of most typical information whose probabilities reach p together (arXiv 2202.00666).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output (arXiv 1909.05858).
        presence_penalty, frequency_penalty: taken from the logits of tokens generated so far, once and per occurrence.
        logit_bias: added to the logits of token ids.
        bad_words: token sequences that must not be generated, given as ids.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end it beside the model's own.
        ignore_eos: go on after the model's end of text.
        seed: the same tokens for the same prompt, in exact mode whatever else runs; None draws one.
        n: independent continuations of the prompt.
        logprobs: report the chosen token's log-probability and so many of the most likely ones; None for none.
        prompt_logprobs: the same for every token of the prompt.
        prompt_logprobs_from: or for those from this one on, counted from 0; what lies before may then come from the prefix cache.
        structure: the form the text must have; it ends where nothing can follow.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    structure: Structure | None = None

    def __post_init__(self) -> None:
        self._collect()
        require_number("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0, None, optional=True, whole=True)
        require_number("min_tokens", self.min_tokens, 0, self.max_tokens, whole=True)
        require_number("temperature", self.temperature, 0, 100)
        require_number("top_k", self.top_k, 0, None, whole=True)
        require_number("top_p", self.top_p, 0, 1, above=True)
        require_number("min_p", self.min_p, 0, 1)
        require_number("typical_p", self.typical_p, 0, 1, above=True)
        require_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        require_number("presence_penalty", self.presence_penalty, -2, 2)
        require_number("frequency_penalty", self.frequency_penalty, -2, 2)
        require_number("n", self.n, 1, 1 if self.max_tokens == 0 else MAX_N, whole=True)
        require_number("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True, whole=True)
        require_number("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True, whole=True)
        require_number("prompt_logprobs_from", self.prompt_logprobs_from, 1, None, whole=True)
        require_number("seed", self.seed, -(2**63), 2**63 - 1, optional=True, whole=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; give true or false")
        if not isinstance(self.structure, Structure | None):
            raise RequestError(f"structure is {self.structure!r}; give a Structure, such as Structure('regex', '[0-9]+')")
        for token, bias in self.logit_bias.items():
            require_number(f"logit_bias[{token}]", bias, -100, 100)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop holds {len(self.stop)} strings; give at most {MAX_STOPS}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError(f"stop is {self.stop!r}; give strings that are not empty")
        if any(not words for words in self.bad_words):
            raise RequestError("bad_words holds an empty sequence; give at least one token id each")

    def _collect(self) -> None:
        """Take any collection for those of several, one string for `stop`, and numbers of any library."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Real) and not isinstance(value, int | float):
                object.__setattr__(self, each.name, int(value) if isinstance(value, Integral) else float(value))
        if not isinstance(self.logit_bias, dict):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; give a dict of numbers by token id")
        stop = (self.stop,) if isinstance(self.stop, str) else _collected("stop", self.stop, "a string, or several")
        ending = _collected("stop_token_ids", self.stop_token_ids, "token ids")
        kind = "sequences of token ids"
        bad = [_collected("bad_words", words, kind) for words in _collected("bad_words", self.bad_words, kind)]
        ids = (*self.logit_bias, *ending, *(token for words in bad for token in words))
        odd = [token for token in ids if isinstance(token, bool) or not isinstance(token, Integral)]
        if odd:
            raise RequestError(f"{odd[0]!r} is no token id; logit_bias, stop_token_ids and bad_words take whole numbers")
        for name, value in (("stop", stop), ("stop_token_ids", frozenset(map(int, ending))), ("bad_words", tuple(tuple(map(int, w)) for w in bad))):
            object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _collected(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {value!r}; give {wanted}")
    return tuple(value)


def require_number(
    name: str, value: float | None, low: float, high: float | None, *, optional: bool = False, above: bool = False, whole: bool = False
) -> None:
    """Raises RequestError unless the value is a number, a whole one where asked, of the range; `above` leaves out the lower end."""
    if value is None and optional:
        return
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or (above and value == low) or (high is not None and value > high):
        start = f"above {low:g}" if above else f"at least {low:g}"
        end = f" and at most {high:g}" if high is not None else ""
        raise RequestError(f"{name} is {value!r}; give a {'whole ' if whole else ''}number of {start}{end}")
