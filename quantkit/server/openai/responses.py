"""What clients get. A chunk of a stream has the same id and time as every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from quantkit.runtime.outputs import RequestOutput

Finish = Literal["stop", "length"]


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of the prompts, each counted once, and of all continuations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> Usage:
        prompt = sum(len(output.prompt_ids) for output in outputs)
        generated = sum(len(completion.token_ids) for output in outputs for completion in output.completions)
        details = PromptDetails(cached_tokens=sum(output.num_cached for output in outputs))
        return cls(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated, prompt_tokens_details=details)


class LegacyLogprobs(BaseModel):
    """One entry a token; those of the echoed prompt come first, the first of them without a number."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class _Choice(BaseModel):
    index: int
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None


class TextChoice(_Choice):
    text: str
    logprobs: LegacyLogprobs | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class MessageChoice(_Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None


class DeltaChoice(_Choice):
    """delta: role and content in the first chunk, content in the others, nothing where a choice only ends."""

    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None


class _Response(BaseModel):
    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None


class Completion(_Response):
    object: str = "text_completion"
    choices: list[TextChoice]


class ChatCompletion(_Response):
    object: str = "chat.completion"
    choices: list[MessageChoice]


class ChatChunk(_Response):
    object: str = "chat.completion.chunk"
    choices: list[DeltaChoice]


class ModelCard(BaseModel):
    """The last three are vLLM's.

    Attributes:
        root: where it was loaded from.
        parent: the model that an adapter is put on.
        max_model_len: tokens of prompt and answer.
    """

    id: str
    object: str = "model"
    created: int
    owned_by: str = "quantkit"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]
