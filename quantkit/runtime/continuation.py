"""A request on its way: each continuation's sequence, and what its tokens have come to: text, log-probabilities, an end."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import EngineError, RequestError
from quantkit.runtime.detokenizer import TextStream
from quantkit.runtime.logits import SampleRequest
from quantkit.runtime.matcher import Matcher
from quantkit.runtime.outputs import Completion, RequestOutput
from quantkit.runtime.sampler import Sampled
from quantkit.runtime.sequence import FinishReason, Sequence

_NOT_FINITE = "the model's logits are not finite; the checkpoint is damaged, or its values overflow in this mode"


@dataclass(eq=False, slots=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        stream: its text; None where the model has no tokenizer.
        matcher: what its structure allows next; None where it is free.
    """

    sequence: Sequence
    completion: Completion
    stream: TextStream | None
    matcher: Matcher | None

    def take(self, chosen: Sampled, *, eos: frozenset[int], longest: int) -> FinishReason | None:
        """Append a token; why it was the last, or None.

        Args:
            longest: tokens that prompt and output may reach.
        """
        completion, params = self.completion, self.sequence.params
        completion.token_ids.append(chosen.token)
        num_output = len(completion.token_ids)
        if completion.logprobs is not None and chosen.logprobs is not None:
            completion.logprobs.append(chosen.logprobs)
        may_stop = num_output >= params.min_tokens
        is_end = chosen.token in eos and (self.matcher is not None or not params.ignore_eos)
        if may_stop and (is_end or chosen.token in params.stop_token_ids):
            completion.stop_reason = None if is_end else chosen.token
            return "stop"
        if self.stream is not None:
            self.stream.push(chosen.token, may_stop=may_stop)
            if self.stream.stopped_by is not None:
                completion.stop_reason = self.stream.stopped_by
                return "stop"
        if self.matcher is not None:
            self.matcher.take(chosen.token)
            if self.matcher.is_complete:
                return "stop"
        is_full = num_output >= (params.max_tokens or longest) or self.sequence.num_prompt + num_output >= longest
        return "length" if is_full else None

    def end(self, reason: FinishReason) -> None:
        """It is over: what was held back of its text is shown."""
        self.completion.finish_reason = reason
        if self.stream is not None:
            self.completion.text = self.stream.finish()

    def blame(self, *, is_finite: bool) -> None:
        """Say why no token could be chosen from logits that are finite, or are not."""
        if is_finite:
            allowed = "" if self.matcher is None else " of what its structure allows"
            reason = (self.matcher and self.matcher.error) or f"the request bars all{allowed}"
            self.completion.error = RequestError(f"no token can follow: {reason}")
        else:
            self.completion.error = EngineError(_NOT_FINITE)

    def wish(self, eos: frozenset[int]) -> SampleRequest:
        """What it asks of its next token."""
        sequence, matcher = self.sequence, self.matcher
        return SampleRequest(sequence.params, sequence.prompt_view, sequence.output_view, sequence.seed, eos, matcher and matcher.allowed())

    def catch_up(self) -> None:
        """Write the text so far into the completion."""
        if self.stream is not None:
            self.completion.text = self.stream.catch_up()


@dataclass(eq=False, slots=True)
class Tracked:
    """A request and its continuations."""

    output: RequestOutput
    continuations: list[Continuation]
