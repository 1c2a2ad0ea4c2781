"""The face of the runtime in Python: prompts in, continuations out, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any, SupportsIndex

from quantkit.errors import RequestError, UsageError, did_you_mean
from quantkit.runtime.beam_search import Beam, beam_search
from quantkit.runtime.detokenizer import TextStream
from quantkit.runtime.engine import Engine
from quantkit.runtime.options import EngineOptions
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import SamplingParams, require_number

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Args:
        source: folder, hub id, `modelscope:org/name` or "reference"; of any container that quantkit reads.
        options: the fields of EngineOptions.

    Raises:
        QuantkitError: the model cannot be loaded, or an option is not known or valid.
    """

    def __init__(self, source: str, **options: Any) -> None:
        _require_known("LLM", options, EngineOptions)
        self.engine = Engine(source, EngineOptions(**options))
        self._ids = count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, lora: str | Sequence[str | None] | None = None,
        **settings: Any,
    ) -> list[RequestOutput]:  # fmt: skip
        """Continue every prompt, many at once.

        Args:
            prompts: texts or lists of token ids, or one of them.
            params: how to sample; or its fields as keywords, such as max_tokens=64, temperature=0.
            lora: the adapter to take, by its name in EngineOptions.lora; or one for each prompt, None for the model itself.

        Raises:
            RequestError: a prompt or a parameter cannot be served; nothing was generated.
        """
        params = _params(params, settings)
        outputs: list[RequestOutput] = []
        try:
            several = _several(prompts)
            self.engine.require_places(len(several))
            for prompt, adapter in zip(several, _each(lora, len(several)), strict=True):
                outputs.append(self.engine.add(prompt, params, request_id=f"request-{next(self._ids)}", lora=adapter))
            while not all(output.is_finished for output in outputs):
                self.engine.step()
        except BaseException:
            for output in outputs:
                self.engine.cancel(output.id)
            raise
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, lora: str | None = None, **settings: Any) -> Iterator[str]:
        """The first continuation of a prompt, piece by piece; leaving the iterator cancels the request.

        Args:
            lora: the adapter to take.

        Raises:
            RequestError: the prompt or a parameter cannot be served.
            EngineError: the request failed on its way, as by logits that are not finite.
        """
        output = self.engine.add(prompt, _params(params, settings), request_id=f"request-{next(self._ids)}", lora=lora)
        first, shown = output.completions[0], 0
        try:
            while not output.is_finished or shown < len(first.text):
                if not output.is_finished:
                    self.engine.step()
                    self.engine.catch_up(output.id)
                if len(first.text) > shown:  # steps taken for others bring this one forward too
                    new, shown = first.text[shown:], len(first.text)
                    yield new
            if first.error:
                raise first.error
        finally:
            self.engine.cancel(output.id)

    def beam_search(self, prompt: Prompt, *, width: int = 4, max_tokens: int = 16, length_penalty: float = 1.0) -> list[Beam]:
        """The most likely continuations of a prompt by beam search, best first.

        Raises:
            RequestError: the prompt or the width cannot be served, or prompt and answer are longer than the context.
        """
        engine = self.engine
        ids, longest = engine.encode(prompt), engine.scheduler.max_length
        require_number("max_tokens", max_tokens, 1, None, whole=True)
        if len(ids) + max_tokens > longest:
            raise RequestError(f"{len(ids)} tokens of prompt and {max_tokens} to generate are more than the {longest} that fit; lower max_tokens")
        beams = beam_search(self.generate, ids, width=width, max_tokens=max_tokens, length_penalty=length_penalty, eos=engine.eos)
        return [replace(beam, text=self._text_of(ids, beam)) for beam in beams]

    def _text_of(self, prompt: list[int], beam: Beam) -> str:
        if self.engine.tokenizer is None:
            return ""
        stream = TextStream(self.engine.tokenizer, prompt)
        for token in beam.token_ids:
            stream.push(token)
        return stream.finish()

    def chat(self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None, **settings: Any) -> RequestOutput:
        """Answer a conversation through the model's own chat template."""
        return self.generate([self.chat_prompt(messages)], params, **settings)[0]

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn.

        Raises:
            RequestError: the model has no chat template, or it does not take these messages.
        """
        return self.engine.encode_chat(messages)


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        return [prompts]  # type: ignore[list-item]
    several = list(prompts)
    is_one = bool(several) and isinstance(several[0], SupportsIndex) and not getattr(several[0], "ndim", 0)
    return [several] if is_one else several  # type: ignore[list-item]


def _each(lora: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The adapter of each prompt."""
    if lora is None or isinstance(lora, str):
        return [lora] * count
    adapters = list(lora) if isinstance(lora, Iterable) else [lora]
    if len(adapters) != count or not all(isinstance(each, str | None) for each in adapters):
        raise RequestError(f"lora is {lora!r}; give the name of an adapter, or one or None for each of the {count} prompts")
    return adapters


def _params(params: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    if params is not None and settings:
        raise UsageError("give params or its fields as keywords, not both")
    if not isinstance(params, SamplingParams | None):
        raise UsageError(f"params is {params!r}; give SamplingParams, or its fields as keywords")
    _require_known("generate", settings, SamplingParams)
    return params or SamplingParams(**settings)


def _require_known(what: str, given: dict[str, Any], settings: type) -> None:
    known = {f.name for f in fields(settings)}
    for name in given:
        if name not in known:
            raise UsageError(f"{what} has no option {name!r}; {did_you_mean(name, known)}")
