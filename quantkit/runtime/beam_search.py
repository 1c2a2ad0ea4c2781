"""Beam search as transformers' generate does it with num_beams and early_stopping=False, one request of one token for each beam and step.

The prefix cache holds what the beams have in common, so a step computes the tokens of no more than a block for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.errors import RequestError
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import MAX_LOGPROBS, SamplingParams, require_number

Generate = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation.

    Attributes:
        logprob: sum of its tokens' log-probabilities.
        score: logprob / number of tokens ** length_penalty.
        text: nothing where there is no tokenizer.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    text: str = ""


def beam_search(generate: Generate, prompt: list[int], *, width: int, max_tokens: int, length_penalty: float, eos: frozenset[int]) -> list[Beam]:
    """The best continuations of a prompt, best first, at most `width` of them.

    Args:
        generate: continues prompts by one token.
        length_penalty: above 0 favors long continuations.
        eos: ends of text; an end is the last token of a beam.

    Raises:
        RequestError: the width or the number of tokens is not possible, or the model's logits are not finite.
    """
    require_number("width", width, 1, None, whole=True)
    require_number("length_penalty", length_penalty, -100, 100)
    num_wanted = max(2, 1 + len(eos)) * width
    if num_wanted > MAX_LOGPROBS:
        raise RequestError(f"width is {width}; give at least 1 and at most {MAX_LOGPROBS // max(2, 1 + len(eos))}")
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=num_wanted)
    running, finished = [Beam((), 0.0, 0.0)], []
    for length in range(1, max_tokens + 1):
        candidates = _continued(running, generate([[*prompt, *beam.token_ids] for beam in running], params), length, length_penalty)[:num_wanted]
        is_last = length == max_tokens
        finished += [beam for beam in candidates[:width] if is_last or beam.token_ids[-1] in eos]
        finished = sorted(finished, key=lambda beam: -beam.score)[:width]
        running = [beam for beam in candidates if beam.token_ids[-1] not in eos][:width]
        if not running or (len(finished) == width and running[0].score <= finished[-1].score):
            break
    return finished


def _continued(running: list[Beam], outputs: list[RequestOutput], length: int, length_penalty: float) -> list[Beam]:
    """Every beam with each of its most likely next tokens, most likely first."""
    found = []
    for beam, output in zip(running, outputs, strict=True):
        completion = output.completions[0]
        if not completion.logprobs:
            raise RequestError(f"beam search ended: {completion.error or completion.finish_reason}")
        for token, logprob in completion.logprobs[0].top:
            total = beam.logprob + logprob
            found.append(Beam((*beam.token_ids, token), total, total / length**length_penalty))
    return sorted(found, key=lambda beam: -beam.logprob)
