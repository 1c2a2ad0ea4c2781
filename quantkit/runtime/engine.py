"""Requests in, tokens out, one step at a time. Everything runs in the caller's thread; who serves others puts a thread around it.

A request that cannot be served is refused when it is added; one whose logits are not finite fails alone.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError, TooLongError, did_you_mean
from quantkit.models.device import find_device
from quantkit.runtime.block_pool import BlockPool
from quantkit.runtime.choosing import choose
from quantkit.runtime.continuation import Continuation, Tracked
from quantkit.runtime.decoders import decoder_of
from quantkit.runtime.detokenizer import TextStream
from quantkit.runtime.draft_length import DraftLength
from quantkit.runtime.loader import load
from quantkit.runtime.lora import attach
from quantkit.runtime.matcher import Compiler, Matcher
from quantkit.runtime.options import NGRAM, EngineOptions
from quantkit.runtime.outputs import Completion, RequestOutput
from quantkit.runtime.rope import freeze
from quantkit.runtime.runner import Runner, Wanted
from quantkit.runtime.sampler import LOGPROBS_BYTES, Sampled, SampleRequest, TokenLogprobs, token_logprobs
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.scheduler import Piece, Scheduler, SchedulerConfig
from quantkit.runtime.sequence import FinishReason, Sequence
from quantkit.runtime.set_up import context_of, end_of_text, layout_of, load_draft, num_blocks_of, tokenizer_of, warn_where_inexact
from quantkit.runtime.speculation import DraftModel, NGram, Proposer, guess, guess_behind, settle

_log = logging.getLogger("quantkit")
_SEEDS = 1 << 63
_LONG_TOKEN = 64
"""Characters that one token may stand for, even of a text that the vocabulary does not know."""


@dataclass(slots=True)
class EngineStats:
    """Counters since the start.

    Attributes:
        num_drafted: guesses that were computed, num_accepted those of them that held.
    """

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_not_finite: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the guesses that held; 0 before the first."""
        return self.num_accepted / max(1, self.num_drafted)


class Engine:
    """One model, its cache and its requests.

    Raises:
        QuantkitError: the model cannot be loaded or run, or the memory holds no cache.
    """

    def __init__(self, source: str, options: EngineOptions | None = None) -> None:
        self.options = options = options or EngineOptions()
        device = find_device(options.device)
        self.loaded = load(
            source, mode=options.mode, device=device, quantization=options.quantization, trust_remote_code=options.trust_remote_code
        )
        attach(self.loaded, options.lora, options.mode)
        self.tokenizer = tokenizer_of(self.loaded, options)
        self.context = context_of(self.loaded, options)
        freeze(self.loaded.model, self.context)
        self.eos = end_of_text(self.loaded, self.tokenizer)
        draft = load_draft(self.loaded, self.tokenizer, options)
        models = [self.loaded] if draft is None else [self.loaded, draft]
        decoders = [decoder_of(model, options.mode, min(self.context, model.context)) for model in models]
        layouts = [layout_of(model, decoder, options) for model, decoder in zip(models, decoders, strict=True)]
        num_blocks = num_blocks_of(options, self.context, sum(layout.bytes_per_block for layout in layouts), device)
        self.cache, *draft_cache = [layout.open(num_blocks) for layout in layouts]
        self.proposer: Proposer | None = NGram() if options.speculation == NGRAM else None
        if draft is not None:
            self.proposer = DraftModel(draft, decoders[1], draft_cache[0], eos=self.eos, width=self.loaded.vocabulary, options=options)
        scored = max(1, LOGPROBS_BYTES // (4 * self.loaded.vocabulary))
        limits = SchedulerConfig(options.max_tokens_per_step, options.max_sequences, options.max_chunk, self.context, options.max_waiting, scored)
        self.scheduler = Scheduler(BlockPool(num_blocks, options.block_size, caching=options.prefix_caching), limits)
        self.runner = Runner(decoders[0], self.cache, limits, is_even=options.mode == "exact" and device.type == "cpu")
        warn_where_inexact(self.loaded, layouts[0], options)
        self.stats = EngineStats()
        self._random = random.Random(options.seed)
        self._requests: dict[str, Tracked] = {}
        self._request_of: dict[str, tuple[Tracked, Continuation]] = {}
        _log.info("KV cache: %s", self.describe_cache())

    @cached_property
    def compiler(self) -> Compiler:
        """Of structures; servers ask it before they hand a request over, so that no step waits for it.

        Raises:
            RequestError: the model has no tokenizer, or what compiles is not installed.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self.loaded.name} has no tokenizer, so its output cannot be structured")
        return Compiler(self.tokenizer, vocabulary=self.loaded.vocabulary, eos=self.eos)

    def describe_cache(self) -> str:
        size, count = self.options.block_size, self.cache.num_blocks
        return f"{count:,} blocks of {size} = {count * size:,} tokens"

    def encode(self, prompt: str | Tokens[int]) -> list[int]:
        """The prompt's token ids, with what the tokenizer puts before a text.

        Raises:
            RequestError: it is neither text nor ids, or it is a text and the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return _ids_of(prompt)
        if self.tokenizer is None:
            raise RequestError(f"{self.loaded.name} has no tokenizer, so prompts must be token ids")
        return self._tokens(prompt)

    def _tokens(self, text: str, **settings: bool) -> list[int]:
        """Long texts are refused before they are tokenized, which takes long: no token writes more characters than the longest one."""
        most = self._longest_token * (self.scheduler.max_length + 1)
        if len(text) > most:
            reason = f"a text of {len(text):,} characters makes more tokens than the {self.scheduler.max_length:,} that fit"
            raise TooLongError(f"{reason}; shorten it below {most:,} characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"character {error.start} of the text is {text[error.start]!r}, which is not Unicode text by itself") from error
        return list(self.tokenizer(text, verbose=False, **settings)["input_ids"])

    @cached_property
    def _longest_token(self) -> int:
        return max(_LONG_TOKEN, *map(len, self.tokenizer.get_vocab()))

    def encode_chat(self, messages: Tokens[dict[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn.

        Raises:
            RequestError: the model has no chat template, or it does not take these messages.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise RequestError(f"{self.loaded.name} has no chat template; give it a prompt as text")
        try:
            text = str(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates raise what they like
            raise RequestError(f"the chat template of {self.loaded.name} does not take these messages: {error}") from error
        return self._tokens(text, add_special_tokens=False)

    def add(
        self, prompt: str | Tokens[int], params: SamplingParams | None = None, *, request_id: str, priority: int = 0, tenant: str = "",
        salt: str = "", lora: str | None = None, matcher: Matcher | None = None,
    ) -> RequestOutput:  # fmt: skip
        """Queue a request; the output returned is filled in as steps are taken.

        Args:
            matcher: what the compiler made of the parameters' structure, where that was done before.

        Raises:
            RequestError: the prompt is empty or too long, its ids or the parameters are out of range, the id is taken, the queue is full, or
                there is no such adapter.
        """
        params = params or SamplingParams()
        if lora is not None and not isinstance(lora, str):
            raise RequestError(f"lora is {lora!r}; give the name of an adapter")
        if lora is not None and lora not in self.options.lora:
            hint = did_you_mean(lora, self.options.lora) if self.options.lora else "none is; name their folders when the model is loaded"
            raise RequestError(f"no adapter {lora!r} is loaded; {hint}")
        if request_id in self._requests:
            raise RequestError(f"a request with the id {request_id!r} is running already; give another id")
        ids = self.encode(prompt)
        if len(ids) > self.scheduler.max_length + 1:  # before it is looked at token by token, and copied for each continuation
            raise TooLongError(f"a prompt of {len(ids):,} tokens is more than the {self.scheduler.max_length:,} that fit; shorten it")
        self._check(ids, params)
        params = self._bounded(params, len(ids))
        if params.structure is not None and matcher is None:
            matcher = self.compiler.compile(params.structure)
        seed = self._random.randrange(_SEEDS) if params.seed is None else params.seed
        sequences = [
            Sequence(f"{request_id}#{i}", list(ids), params, priority, tenant, salt, lora or "", seed=(seed + i * 0x9E3779B97F4A7C15) % _SEEDS,
                     guessing=DraftLength(self.options.num_draft_tokens))
            for i in range(params.n)
        ]  # fmt: skip
        sequences[0].siblings = sequences[1:]
        completions = [Completion(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        scored: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None] * min(params.prompt_logprobs_from, len(ids))
        output = RequestOutput(request_id, prompt if isinstance(prompt, str) else None, list(ids), completions, scored)
        streams = [TextStream(self.tokenizer, ids, params.stop) if self.tokenizer else None for _ in sequences]
        self.scheduler.add(sequences[0])
        parts = zip(sequences, completions, streams, strict=True)
        tracked = self._requests[request_id] = Tracked(output, [Continuation(*part, matcher and matcher.copy()) for part in parts])
        self._request_of |= {each.sequence.id: (tracked, each) for each in tracked.continuations}
        self.stats.num_prompt_tokens += len(ids)
        return output

    def require_places(self, count: int) -> None:
        """Raises RequestError where so many requests at once could never wait together."""
        most = self.options.max_waiting
        if most is not None and count > most:
            raise RequestError(f"{count} prompts at once are more than the {most} that may wait; give fewer")

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are no error, as it may just have ended."""
        tracked = self._requests.get(request_id)
        for each in tracked.continuations if tracked else []:
            if each.completion.finish_reason is None:  # a sibling that waits has ended with the first already
                self._end(each.sequence, "cancelled")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def catch_up(self, request_id: str) -> None:
        """Write the text of a request's tokens so far into its output, which else has it in the end; unknown ids are no error."""
        tracked = self._requests.get(request_id)
        for each in tracked.continuations if tracked else []:
            each.catch_up()

    def step(self) -> list[RequestOutput]:
        """One batch: the requests it brought forward."""
        drafts = guess(self.proposer, self.scheduler) if self.proposer else {}
        batch = self.scheduler.schedule()
        if not batch.pieces:
            return []
        self.stats.num_steps += 1
        try:
            if self.proposer:
                drafts |= guess_behind(self.proposer, self.scheduler, batch, drafts)
            logits, wanted = self.runner.forward(batch)
        except BaseException:
            self.scheduler.give_back(batch)  # what was to be copied or computed was not
            raise
        for each in wanted:
            self._keep_prompt_logprobs(each, logits)
        ready = [each for each in wanted if each.piece.reaches_end and not each.piece.sequence.is_only_scored]
        chosen = choose(logits, ready, self._wish, drafts)
        failed = {each.piece.sequence.id: _is_finite(logits[each.rows]) for each in ready if chosen[each.piece.sequence.id] is None}
        if self.proposer:
            settle(batch, drafts, chosen)
        touched: dict[str, RequestOutput] = {}
        for piece in batch.pieces:
            output = self._request_of[piece.sequence.id][0].output
            touched[output.id] = output
            if piece.reaches_end and not piece.sequence.is_only_scored:
                self._commit(piece, chosen, failed)
            else:
                self.scheduler.commit(piece, [])
                if piece.reaches_end:
                    self._end_scored(piece.sequence)
        return list(touched.values())

    def _commit(self, piece: Piece, chosen: dict[str, list[Sampled] | None], failed: dict[str, bool]) -> None:
        """Commit a piece with the tokens chosen behind it; its siblings take theirs from the same logits.

        Args:
            failed: sequences that nothing could be chosen for, and whether their logits are finite.
        """
        sequence, siblings = piece.sequence, list(piece.sequence.siblings)
        own = chosen[sequence.id]
        if own is None:
            for each in (sequence, *siblings):
                self._fail(each, is_finite=failed[sequence.id])
            return
        self.stats.num_drafted += len(piece.guesses)
        self.stats.num_accepted += len(own) - 1
        self.scheduler.commit(piece, [each.token for each in own])
        for token in own:
            if not sequence.is_finished:  # what was accepted behind an end is dropped
                self._take(sequence, token)
        for sibling in siblings:
            if not sibling.is_finished:
                (token,) = chosen[sibling.id] or ()
                sibling.tokens.append(token.token)
                self._take(sibling, token)

    def _end_scored(self, sequence: Sequence) -> None:
        """All of a prompt is scored, and nothing is to follow."""
        output = self._request_of[sequence.id][0].output
        self._count_cached(sequence, output)
        if all(each is None or math.isfinite(each.logprob) for each in output.prompt_logprobs or ()):
            self._end(sequence, "length")
        else:
            self._fail(sequence, is_finite=False)

    def _count_cached(self, sequence: Sequence, output: RequestOutput) -> None:
        output.num_cached = sequence.num_cached or 0
        self.stats.num_cached_tokens += output.num_cached

    def _take(self, sequence: Sequence, chosen: Sampled) -> None:
        """A token was chosen: it is the continuation's next, and may be its last."""
        tracked, continuation = self._request_of[sequence.id]
        if not continuation.completion.token_ids and continuation is tracked.continuations[0]:
            self._count_cached(sequence, tracked.output)
        self.stats.num_generated_tokens += 1
        reason = continuation.take(chosen, eos=self.eos, longest=self.scheduler.max_length)
        if reason is not None:
            self._end(sequence, reason)

    def _fail(self, sequence: Sequence, *, is_finite: bool) -> None:
        self.stats.num_not_finite += not is_finite
        self._request_of[sequence.id][1].blame(is_finite=is_finite)
        self._end(sequence, "error")

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        tracked, continuation = self._request_of[sequence.id]
        self.scheduler.finish(sequence, reason)
        continuation.end(reason)
        if tracked.output.is_finished:
            del self._requests[tracked.output.id]
            for each in tracked.continuations:
                del self._request_of[each.sequence.id]

    def _wish(self, sequence: Sequence) -> SampleRequest:
        return self._request_of[sequence.id][1].wish(self.eos)

    def _keep_prompt_logprobs(self, wanted: Wanted, logits: Tensor) -> None:
        """Of the tokens of the prompt that this piece predicts: row i of it stands before token start + i + 1."""
        piece, sequence = wanted.piece, wanted.piece.sequence
        tracked, continuation = self._request_of[sequence.id]
        kept = tracked.output.prompt_logprobs
        if kept is None or continuation is not tracked.continuations[0] or len(kept) >= sequence.num_prompt:
            return
        first = len(kept)  # a preempted prompt is computed again from its beginning
        targets = sequence.tokens[first : min(piece.end + 1, sequence.num_prompt)]
        if targets:
            start = first - 1 - max(piece.start, sequence.scored_from)
            assert start >= 0, "log-probabilities of the prompt have a gap"
            rows = logits[wanted.rows][start : start + len(targets)]
            kept += token_logprobs(rows, torch.tensor(targets, device=rows.device), sequence.params.prompt_logprobs or 0)

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        vocabulary = self.loaded.vocabulary
        named = {"the prompt": ids, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for name, tokens in (*named.items(), *(("bad_words", words) for words in params.bad_words)):
            bad = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if bad is not None:
                raise RequestError(f"{name} holds token {bad}; ids go from 0 to {vocabulary - 1}")
        if params.stop and self.tokenizer is None:
            raise RequestError(f"{self.loaded.name} has no tokenizer, so stop strings cannot be found; use stop_token_ids")

    def _bounded(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        """Without a limit, what the context and the cache leave."""
        if params.max_tokens is not None:
            return params
        return replace(params, max_tokens=max(1, self.scheduler.max_length - num_prompt))


def _ids_of(prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, bytes | bytearray | Mapping) or any(isinstance(token, bool) for token in prompt):
            raise TypeError
        return [index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(f"the prompt is {repr(prompt)[:80]}; give a text, or token ids") from error


def _is_finite(logits: Tensor) -> bool:
    return bool(logits.amax(-1).isfinite().all())
