"""How fast a checkpoint runs: many requests at once, one prompt, a prefix found in the cache, and what a step costs beside the model itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Throughput:
    """Prompts of one length answered at once.

    Attributes:
        seconds: from the first prompt in to the last token out.
        overhead_ms: processor time of the engine's thread in a decoding step, outside the decoder: scheduling, sampling, text. None where it is
            another program's.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    overhead_ms: float | None = None

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_requests * self.num_output_tokens / self.seconds


def make_prompts(count: int, length: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids, so that no two prompts share a prefix."""
    dice = random.Random(seed)
    return [[dice.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def throughput(llm: LLM, prompts: list[list[int]], num_output: int) -> Throughput:
    """Answer all prompts greedily, with the end of text ignored."""
    engine = llm.engine
    decoder = engine.runner.decoder
    inside = _Stopwatch(decoder.logits)
    decoder.logits = inside
    settings = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
    try:
        started = time.perf_counter()
        outputs = [engine.add(prompt, settings, request_id=f"bench-{i}") for i, prompt in enumerate(prompts)]
        decoding: list[float] = []
        while engine.has_work:
            is_decoding = all(output.completions[0].token_ids for output in outputs)
            before, began = inside.seconds, time.thread_time()
            engine.step()
            if is_decoding:
                decoding.append(time.thread_time() - began - (inside.seconds - before))
        seconds = time.perf_counter() - started
    finally:
        del decoder.logits
    overhead = 1000 * sorted(decoding)[len(decoding) // 2] if decoding else None
    return Throughput(len(prompts), len(prompts[0]), num_output, seconds, overhead)


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Seconds from a prompt to its first token."""
    started = time.perf_counter()
    llm.generate([prompt], max_tokens=1, temperature=0, ignore_eos=True)
    return time.perf_counter() - started


def decode_rate(llm: LLM, prompt: list[int], num_output: int) -> float:
    """Tokens a second behind the first one, of one request alone."""
    engine = llm.engine
    output = engine.add(prompt, SamplingParams(max_tokens=num_output + 1, temperature=0, ignore_eos=True), request_id="bench-decode")
    while not output.completions[0].token_ids:
        engine.step()
    started = time.perf_counter()
    while not output.is_finished:
        engine.step()
    return num_output / (time.perf_counter() - started)


def prefix_hit(llm: LLM, length: int, vocabulary: int, *, tail: int = 16, repeats: int = 3) -> tuple[float, float]:
    """Seconds to the first token of a prompt nobody has asked, and of one whose first `length` tokens somebody has; the best of some repeats."""
    cold, warm = [], []
    for seed in range(repeats):
        shared, first, second = (make_prompts(1, n, vocabulary, seed=seed * 10 + i)[0] for i, n in enumerate((length, tail, tail)))
        cold.append(first_token(llm, shared + first))
        warm.append(first_token(llm, shared + second))
    return min(cold), min(warm)


class _Stopwatch:
    """A function that adds up the processor time that its thread spends in it."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: object, **kwargs: object) -> object:
        started = time.thread_time()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - started
