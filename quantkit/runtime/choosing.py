"""From a step's logits to tokens: one for each sequence whose piece reaches its end; of guesses those that hold and one more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.runtime.logits import SampleRequest
from quantkit.runtime.runner import Wanted
from quantkit.runtime.sampler import Sampled, probabilities, sample, token_logprobs, verify
from quantkit.runtime.sequence import Sequence
from quantkit.runtime.speculation import Draft


@dataclass(frozen=True, slots=True)
class _Line:
    """The logits that one sequence chooses from: behind its last token and behind each of its guesses, with a request for each."""

    sequence: Sequence
    guesses: list[int]
    rows: range
    requests: list[SampleRequest]


def choose(
    logits: Tensor, wanted: list[Wanted], request_of: Callable[[Sequence], SampleRequest], drafts: Mapping[str, Draft]
) -> dict[str, list[Sampled] | None]:
    """The next tokens of the sequences, and of siblings that fork off behind them, by id; None where the logits leave no sound choice.

    Args:
        logits: float32 [R, V]; of each piece its last rows are taken.
        request_of: what a sequence asks of its next token.
        drafts: by sequence, whence its guesses came.
    """
    drawn, others = [], []
    for each in wanted:
        sequence, draft = each.piece.sequence, drafts.get(each.piece.sequence.id)
        is_drawn = draft is not None and bool(draft.weights)
        for one in (sequence, *sequence.siblings):
            (drawn if is_drawn else others).append(_line(one, each.piece.guesses, each.rows.stop, request_of(one)))
    chosen: dict[str, list[Sampled] | None] = _sampled(logits, others)
    for line in drawn:
        chosen[line.sequence.id] = _verified(logits[line.rows.start : line.rows.stop], line, drafts[line.sequence.id])
    return chosen


def _line(sequence: Sequence, guesses: list[int], stop: int, request: SampleRequest) -> _Line:
    requests = [request]
    if guesses:
        requests += [replace(request, output=[*request.output, *guesses[: i + 1]]) for i in range(len(guesses))]
    return _Line(sequence, guesses, range(stop - len(requests), stop), requests)


def _sampled(logits: Tensor, lines: list[_Line]) -> dict[str, list[Sampled] | None]:
    """Sample behind every guess as if it held, and keep what was right to do so: the tokens are those that would come one by one."""
    rows = [row for line in lines for row in line.rows]
    own = logits if rows == list(range(len(logits))) else logits[rows]
    tokens = iter(sample(own, [request for line in lines for request in line.requests]) if rows else ())
    return {line.sequence.id: _holding([next(tokens) for _ in line.rows], line.guesses) for line in lines}


def _holding(tokens: list[Sampled | None], guesses: list[int]) -> list[Sampled] | None:
    kept = []
    for token, guess in zip(tokens, [*guesses, None], strict=True):
        if token is None:
            break
        kept.append(token)
        if token.token != guess:
            break
    return kept or None


def _verified(logits: Tensor, line: _Line, draft: Draft) -> list[Sampled] | None:
    """Rejection sampling of guesses that were drawn; logits [computed guesses + 1, V]. A guess that was not computed counts for the last row."""
    assert draft.weights is not None
    first, count = line.requests[0], len(line.requests)
    proposed = torch.stack(draft.weights[:count])
    tokens = verify(probabilities(logits, line.requests), draft.tokens[:count], proposed, seed=first.seed, position=len(first.output))
    if tokens is None or first.params.logprobs is None:
        return tokens and [Sampled(token, None) for token in tokens]
    logprobs = token_logprobs(logits[: len(tokens)], torch.tensor(tokens, device=logits.device), first.params.logprobs)
    return [Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
