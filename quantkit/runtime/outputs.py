"""What a request comes back with."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantkit.errors import EngineError, RequestError
from quantkit.runtime.sampler import TokenLogprobs
from quantkit.runtime.sequence import FinishReason


@dataclass(slots=True)
class Completion:
    """One continuation.

    Attributes:
        text: whole in the end; on the way as far as somebody asked for it (`Engine.catch_up`), so that nobody else waits for it.
        stop_reason: the string or token id that ended it; None for the model's own end of text or the length.
        logprobs: one entry a token, where they were asked for.
        error: why it failed, where finish_reason is "error": by what was asked for, or by the model.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: RequestError | EngineError | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations.

    Attributes:
        prompt: the text, None where ids were given.
        prompt_logprobs: one entry a token of the prompt, None for the first and where it was not asked for.
        num_cached: tokens of the prompt that were found in the prefix cache.
    """

    id: str
    prompt: str | None
    prompt_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached: int = 0

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.completions[0].text

    @property
    def is_finished(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)
