"""What clients may send: OpenAI's fields, those of vLLM for sampling, and bounds on every number and size.

A field that would change the answer and is not done yet is refused by name, as is one that nobody knows. null stands for a field not given.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantkit.errors import did_you_mean
from quantkit.runtime.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOPS, SamplingParams
from quantkit.server.errors import ApiError
from quantkit.server.openai.form import Form, ResponseFormat, StructuredOutputs, form_of

MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_TOKENS = 1 << 24
_HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"
})  # fmt: skip
_NOT_YET = frozenset({
    "tools", "tool_choice", "functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort", "verbosity",
    "web_search_options", "suffix", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template",
    "chat_template_kwargs", "prompt_logprobs", "bad_words", "priority", "cache_salt", "use_beam_search",
})  # fmt: skip
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",), "tools": ([],), "modalities": (["text"],), "use_beam_search": (False,), "suffix": ("",),
}  # fmt: skip


def _listed(value: Any) -> Any:
    """stop: one string is a list of one."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _unicode(value: str) -> str:
    """JSON can hold halves of characters, tokenizers cannot."""
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("the text holds half of a surrogate pair; send whole characters")
    return value


def _prompts(value: Any) -> Any:
    """prompt, in its four forms, as a list of prompts."""
    if isinstance(value, str):
        return [_unicode(value)]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts are more than {MAX_PROMPTS}")
        if all(isinstance(each, str) for each in value):
            return [_unicode(each) for each in value]
        if all(_is_ids(each) for each in value):
            return value
    raise ValueError("give a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _text(value: Any) -> Any:
    """content: a string, or text parts, which become lines."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported yet; give {{'type': 'text', 'text': ...}}")
    return "\n".join(part["text"] for part in value)


Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], BeforeValidator(_listed), Field(max_length=MAX_STOPS)]
_OWN = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
_OWN += ("frequency_penalty", "logit_bias", "seed", "n", "ignore_eos")


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="0 or -1 for all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stop: Stop = []
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _knows_its_fields(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS or value in _WITHOUT_EFFECT.get(name, ()):
                continue
            if name in _NOT_YET:
                raise ApiError(400, f"{name} is not supported yet; leave it out", param=name)
            raise ApiError(400, f"unknown field {name[:100]!r}; {did_you_mean(name[:100], type(self).model_fields)}", param=name[:100])
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for streams; leave them out or set stream to true", param="stream_options")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @cached_property
    def form(self) -> Form | None:
        """Raises ApiError where it is too large or not what its kind calls for."""
        return form_of(self.response_format, self.structured_outputs)

    def params(self, **others: Any) -> SamplingParams:
        """Raises RequestError for what does not go together."""
        others["structure"] = self.form and self.form.structure
        given = {name: value for name in _OWN if (value := getattr(self, name)) is not None} | others
        given["top_k"] = max(0, given.get("top_k", 0))
        return SamplingParams(**given, stop=tuple(self.stop), stop_token_ids=frozenset(self.stop_token_ids or ()))


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="0, with echo and logprobs, only scores the prompt")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)

    @model_validator(mode="after")
    def _can_be_answered(self) -> CompletionRequest:
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise ApiError(400, "max_tokens should be greater than or equal to 1; 0 only scores a prompt, with echo and logprobs", param="max_tokens")
        if self.best_of not in (None, self.n or 1):
            message = f"best_of is {self.best_of} and n is {self.n or 1}; choosing among more is not supported, so leave best_of out"
            raise ApiError(400, message, param="best_of")
        if len(self.prompt) * (self.n or 1) > MAX_PROMPTS:
            raise ApiError(400, f"{len(self.prompt)} prompts times n = {self.n} are more than {MAX_PROMPTS} continuations", param="n")
        return self

    def params(self, **others: Any) -> SamplingParams:
        return super().params(logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None, **others)


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text), AfterValidator(_unicode)]

    @model_validator(mode="after")
    def _is_plain(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], "") and name != "name":
                raise ApiError(400, f"messages with {name[:100]!r} are not supported yet; give role and content", param="messages")
        return self

    @property
    def turn(self) -> dict[str, str]:
        """For a chat template; those know developers as system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(_Request):
    """POST /v1/chat/completions. Without max_tokens the answer may fill the context."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs set to true", param="top_logprobs")
        return self

    def params(self, **others: Any) -> SamplingParams:
        limit = self.max_completion_tokens or self.max_tokens
        return super().params(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **others)
