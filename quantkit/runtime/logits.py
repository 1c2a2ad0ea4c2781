"""What a request does to a row of logits: masks, bias and penalties before the softmax, filters behind it.

Rows go one by one, each only through what it asks for, so that no row changes with its neighbours. Ties go to the lowest id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.runtime.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row of logits is for.

    Attributes:
        prompt, output: ids of the tokens so far.
        seed: the sequence's own; the token at position len(output) depends on (seed, len(output)) alone.
        eos: tokens that end text.
        allowed: bool [V], the tokens a grammar admits; None for all.
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    eos: frozenset[int] = frozenset()
    allowed: Tensor | None = None

    @property
    def is_ending_barred(self) -> bool:
        return len(self.output) < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        params = self.params
        return self.allowed is not None or self.is_ending_barred or params.has_penalties or bool(params.logit_bias or params.bad_words)


def change(scores: Tensor, request: SampleRequest) -> None:
    """Masks, bias and penalties of one row [V], in place."""
    params = request.params
    if request.allowed is not None:
        scores.masked_fill_(~request.allowed.to(scores.device), -torch.inf)
    if params.logit_bias:
        ids = _ids(params.logit_bias, scores)
        scores[ids] += torch.tensor([params.logit_bias[token] for token in ids.tolist()], device=scores.device)
    if request.is_ending_barred:
        scores[_ids(request.eos | params.stop_token_ids, scores)] = -torch.inf
    if params.bad_words:
        scores[_ids(_completing(request), scores)] = -torch.inf
    if params.repetition_penalty != 1:
        seen = torch.cat([_ids(request.prompt, scores), _ids(request.output, scores)])
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        seen, counts = _ids(request.output, scores).unique(return_counts=True)
        scores[seen] -= params.presence_penalty + params.frequency_penalty * counts


def _ids(tokens: Iterable[int], scores: Tensor) -> Tensor:
    """As an index, without tokens that a model may read but has no logit for."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    return ids[(ids >= 0) & (ids < len(scores))].to(scores.device)


def _completing(request: SampleRequest) -> list[int]:
    """Tokens that would complete a bad word."""
    longest = max(len(words) for words in request.params.bad_words) - 1
    recent = (*request.prompt[-longest:], *request.output[-longest:]) if longest else ()
    return [words[-1] for words in request.params.bad_words if len(words) == 1 or recent[1 - len(words) :] == words[:-1]]


def distribution(scores: Tensor, requests: list[SampleRequest]) -> Tensor:
    """Probabilities [R, V] after temperature and filters; NaN in rows of which nothing is left."""
    temperatures = [request.params.temperature for request in requests]
    if any(temperature != 1 for temperature in temperatures):
        divisor = torch.tensor(temperatures, device=scores.device, dtype=scores.dtype).clamp_(min=torch.finfo(scores.dtype).tiny)
        # The largest becomes 0 first, lest a low temperature overflow.
        scores = (scores - scores.amax(-1, keepdim=True)).div_(divisor[:, None])
    result = scores.softmax(-1)
    for row, request in zip(result, requests, strict=True):
        params = request.params
        if params.top_k or params.top_p < 1 or params.min_p or params.typical_p < 1:
            _filter(row, params)
    return result


def _filter(row: Tensor, params: SamplingParams) -> None:
    """Leave tokens by top_k, top_p, min_p and typical_p of a distribution [V], in place."""
    tokens = _candidates(row, params)
    if not len(tokens):  # a row of NaN
        return
    weights = row[tokens].double()
    if params.top_p < 1:
        weights = weights[_until(weights, params.top_p * (weights.sum() if params.top_k else 1.0))]
    if params.min_p:
        weights = weights[weights >= params.min_p * weights[0]]
    tokens = tokens[: len(weights)]
    if params.typical_p < 1:
        weights /= weights.sum()
        information = -weights.log()
        order = (information - (weights * information).sum()).abs().sort(stable=True).indices
        order = order[_until(weights[order], params.typical_p)]
        tokens, weights = tokens[order], weights[order]
    row.zero_()
    row[tokens] = (weights / weights.sum()).to(row.dtype)


def _candidates(row: Tensor, params: SamplingParams) -> Tensor:
    """The tokens that top_k, top_p and min_p could leave, most likely first.

    The bound sinks until the rest reaches top_p with something to spare for rounding. It need not sink further than where all that is below it
    weighs less than what top_p leaves out.
    """
    if params.top_k:
        tokens = largest(row, params.top_k)
        return tokens[row[tokens] > 0]
    left_out, peak, bound = 1 - params.top_p, row.amax().item(), 0.0
    if left_out:
        bound, floor = peak, left_out / len(row) / 2
        while bound > floor and torch.threshold(row, bound, 0).sum() < 1 - 0.99 * left_out:
            bound /= 16
    bound = max(bound, params.min_p * peak)
    return _sorted(row, ((row >= bound) & (row > 0)).nonzero().squeeze(1))


def largest(row: Tensor, count: int) -> Tensor:
    """Places of the largest values of [V], largest first."""
    count = min(count, len(row))
    least = row.topk(count, sorted=False).values.amin()
    return _sorted(row, (row >= least).nonzero().squeeze(1))[:count]


def _sorted(row: Tensor, tokens: Tensor) -> Tensor:
    return tokens[row[tokens].sort(descending=True, stable=True).indices]


def _until(weights: Tensor, mass: float | Tensor) -> Tensor:
    """Mask of the first weights that reach the mass together; the first is always of them."""
    return weights.cumsum(0) - weights < mass
