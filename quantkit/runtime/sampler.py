"""From logits to tokens: the most likely one or one drawn, with one uniform number for each; and what guesses of a draft are worth.

A row's token depends on its logits and its request alone, never on the rows beside it: every reduction runs inside a row, and the uniform comes from
(seed, position). Ties go to the lowest id everywhere. Without state; knows nothing of sequences' blocks, models or stop strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.runtime.logits import SampleRequest, change, distribution, largest

LOGPROBS_BYTES = 64 << 20
_BLOCK = 512
_TOKEN, _ACCEPT, _DRAFT = range(3)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the model's own distribution, before any change to its logits.

    Attributes:
        rank: one more than the tokens that are more likely.
        top: the most likely tokens and their log-probabilities, most likely first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, requests: list[SampleRequest]) -> list[Sampled | None]:
    """The next token of each row of float32 [R, V]; the most likely one where the temperature is 0, else drawn from `probabilities`.

    Returns:
        None for a row without a sound choice: its logits hold NaN or inf, or nothing is left of them. The others do not notice.
    """
    tokens: list[int | None] = [None] * len(requests)
    for rows, group, scores, sound in _groups(logits, requests):
        greedy = group[0].params.is_greedy
        chosen = _argmax(scores) if greedy else _draw(distribution(scores, group), [uniform(each.seed, len(each.output)) for each in group])
        if sound is None:
            sound = scores.gather(1, chosen[:, None])[:, 0].isfinite().tolist()
        for row, token, is_sound in zip(rows, chosen.tolist(), sound, strict=True):
            tokens[row] = token if is_sound else None
    logprobs = _requested_logprobs(logits, requests, tokens)
    return [None if token is None else Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]


def probabilities(logits: Tensor, requests: list[SampleRequest]) -> Tensor:
    """What `sample` draws from, float32 [R, V]: one-hot for temperature 0, NaN in rows without a sound choice.

    In this order, each over what the one before left:
        allowed        other tokens get -inf
        logit_bias     added
        min_tokens     eos and stop_token_ids get -inf before so many tokens of output
        bad_words      the last token of a sequence gets -inf where prompt and output end with the rest of it
        repetition     logits of tokens in prompt or output are divided by the penalty where positive, else multiplied
        presence, frequency    taken from logits of tokens in the output, once and per occurrence
        temperature    divides; 0 takes the largest and skips what follows
        top_k          the k most likely tokens
        top_p          the fewest most likely tokens whose probability reaches p
        min_p          tokens of at least min_p times the largest probability
        typical_p      the fewest tokens whose probability reaches p, in order of |-log p - entropy|
    This is the order of transformers' generate from temperature on. Every filter leaves one token at least.
    """
    result = torch.full_like(logits, torch.nan, dtype=torch.float32)
    for rows, group, scores, sound in _groups(logits, requests):
        chosen = torch.zeros_like(scores).scatter_(1, _argmax(scores)[:, None], 1) if group[0].params.is_greedy else distribution(scores, group)
        is_sound = torch.tensor(sound or _sound(scores), device=scores.device)
        result[rows] = chosen.masked_fill_(~is_sound[:, None], torch.nan)
    return result


def verify(target: Tensor, draft: Sequence[int], draft_probabilities: Tensor | None, *, seed: int, position: int) -> list[int] | None:
    """Speculative sampling for one sequence (arXiv 2211.17192): the guesses that hold and one token more, distributed as if drawn one by one.

    Args:
        target: float32 [k + 1, V] or [k, V], `probabilities` after the output and none, one, ... all k guesses, or all but the last, which was not
            computed: its place is then drawn as if it had been.
        draft: the k guesses.
        draft_probabilities: float32 [k, V] that the guesses were drawn from, with `draft_uniform`; None for guesses that were not drawn, such as
            n-grams. Without it the tokens are the very ones that `sample` would give.
        position: tokens of output before the first guess.

    Returns:
        None where a row it comes to is not sound.
    """
    sound, tokens = _sound(target), []
    for at in range(len(target)):
        if not sound[at]:
            return None
        weights = target[at]
        if at < len(draft) and draft_probabilities is not None:
            guess, proposed = draft[at], draft_probabilities[at]
            if uniform(seed, position + at, _ACCEPT) * proposed[guess].item() < weights[guess].item():
                tokens.append(guess)
                continue
            weights = _residual(weights, proposed)
        tokens.append(int(_draw(weights[None], [uniform(seed, position + at)])))
        if at < len(draft) and tokens[-1] != draft[at]:
            break
    return tokens


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of tokens int64 [R] under raw logits [R, V], with the num_top most likely ones; takes LOGPROBS_BYTES at a time."""
    result = []
    rows = max(1, LOGPROBS_BYTES // (4 * logits.shape[1]))
    for part, chosen in zip(logits.split(rows), tokens.split(rows), strict=True):
        logprobs = part.float().log_softmax(-1)
        own = logprobs.gather(1, chosen[:, None])
        ranks = (logprobs > own).sum(-1) + 1
        for row, token, logprob, rank in zip(logprobs, chosen.tolist(), own[:, 0].tolist(), ranks.tolist(), strict=True):
            top = largest(row, num_top) if num_top else chosen[:0]
            result.append(TokenLogprobs(token, logprob, rank, tuple(zip(top.tolist(), row[top].tolist(), strict=True))))
    return result


def uniform(seed: int, position: int, stream: int = _TOKEN) -> float:
    """A number of [0, 1) with 53 bits; streams of a position are independent."""
    digest = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draft_uniform(seed: int, position: int) -> float:
    """For drawing the guess at a position of the output: independent of what `verify` uses there."""
    return uniform(seed, position, _DRAFT)


def _groups(logits: Tensor, requests: list[SampleRequest]) -> Iterable[tuple[list[int], list[SampleRequest], Tensor, list[bool] | None]]:
    """Rows with their requests, their changed logits and whether those are sound before and after, greedy ones apart.

    Logits that nobody changes are not copied where they are all of them, nor looked through where the one that is chosen tells whether they are
    sound: then None.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, request in enumerate(requests):
        kinds.setdefault((request.params.is_greedy, request.changes_logits), []).append(row)
    for (is_greedy, is_changed), rows in kinds.items():
        group = [requests[row] for row in rows]
        scores = logits if len(rows) == len(requests) and not is_changed else logits[rows]
        sound = None if is_greedy and not is_changed else _sound(scores)
        if is_changed:
            for row, request in zip(scores, group, strict=True):
                change(row, request)
            sound = [before and after for before, after in zip(sound or (), _sound(scores), strict=True)]
        yield rows, group, scores, sound


def _sound(logits: Tensor) -> list[bool]:
    """Whether rows hold a finite largest value: a NaN, an inf or nothing but -inf would be theirs."""
    return logits.amax(-1).isfinite().tolist()


def _residual(target: Tensor, proposed: Tensor) -> Tensor:
    """What the target has beyond the draft's distribution, to draw from after a guess fell; rounding may leave nothing where they are equal."""
    beyond = (target - proposed).clamp_(min=0)
    return beyond if beyond.any() else target


def _argmax(scores: Tensor) -> Tensor:
    """The first of the largest of each row [R, V]; on a CPU by numpy, whose argmax is ten times faster than torch's."""
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


def _draw(weights: Tensor, uniforms: list[float]) -> Tensor:
    """Inverse of the distribution function of weights [R, V] at the uniforms: first the block, then the token in it, in float64."""
    ends = _block_sums(weights).double().cumsum(1)  # [R, num_blocks]
    wanted = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, wanted, right=True).clamp_(max=ends.shape[1] - 1)
    end, start = ends.gather(1, block), ends.gather(1, (block - 1).clamp(min=0)).masked_fill_(block == 0, 0)
    columns = _columns(block.squeeze(1))
    within = weights.gather(1, columns.clamp(max=weights.shape[1] - 1)).masked_fill_(columns >= weights.shape[1], 0).double().cumsum(1)
    place = torch.searchsorted(within, (wanted - start) / (end - start) * within[:, -1:], right=True)
    return columns.gather(1, place.clamp_(max=_BLOCK - 1)).squeeze(1)


def _block_sums(values: Tensor) -> Tensor:
    """Sums over every _BLOCK columns of [R, V], the last ones being fewer: [R, num_blocks]."""
    rows, width = values.shape
    whole = width - width % _BLOCK
    parts = [values[:, :whole].reshape(rows, whole // _BLOCK, _BLOCK).sum(-1)]
    if whole < width:
        parts.append(values[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, 1)


def _columns(block: Tensor) -> Tensor:
    """Column numbers [R, _BLOCK] of a block of each row."""
    return block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)


def _requested_logprobs(logits: Tensor, requests: list[SampleRequest], tokens: list[int | None]) -> dict[int, TokenLogprobs]:
    """By row, for those who asked; rows that asked for as many go together."""
    kinds: dict[int, list[int]] = {}
    for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        if token is not None and request.params.logprobs is not None:
            kinds.setdefault(request.params.logprobs, []).append(row)
    result = {}
    for num_top, rows in kinds.items():
        chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)
        result |= zip(rows, token_logprobs(logits[rows], chosen, num_top), strict=True)
    return result
