"""Real requests replayed: lengths and shared prefixes of a published trace, scaled to the model's context, with made-up tokens.

Two forms are read: Mooncake's JSON lines (input_length, output_length, hash_ids of 512-token blocks) and Azure's CSV (ContextTokens,
GeneratedTokens). Requests are asked in their order, a fixed number at once; their times are not kept.
"""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.runtime.llm import LLM
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import SamplingParams

HASHED_TOKENS = 512
"""What one of Mooncake's hash ids stands for."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    prompt: list[int]
    num_output: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay took.

    Attributes:
        num_cached: tokens of prompts that were found in the cache, and num_repeated those that an endless cache would have held.
        first_tokens: seconds from a request's start to its first token, sorted.
    """

    num_requests: int
    num_prompt: int
    num_output: int
    num_cached: int
    num_repeated: int
    num_preemptions: int
    seconds: float
    first_tokens: list[float]

    def percentile(self, share: float) -> float:
        """Seconds to the first token within which this share of the requests had it."""
        return self.first_tokens[min(len(self.first_tokens) - 1, int(share * len(self.first_tokens)))]


def load_trace(path: Path, *, count: int, scale: int, context: int, vocabulary: int) -> list[TraceRequest]:
    """The first requests of a trace, lengths divided by `scale`, prompts cut so that prompt and output fit the context.

    Raises:
        UsageError: the file is of neither form.
    """
    requests = []
    for num_input, num_output, hashes in islice(_rows(path), count):
        wanted_output = max(1, min(num_output // scale, context // 4))
        length = max(1, min(num_input // scale, context - wanted_output - 1))
        prompt: list[int] = []
        for number in hashes if hashes is not None else [-len(requests) - 1]:
            dice = random.Random(number)
            prompt += [dice.randrange(3, vocabulary) for _ in range(HASHED_TOKENS // scale if hashes is not None else length)]
        requests.append(TraceRequest(prompt[:length], wanted_output))
    return requests


def replay(llm: LLM, requests: list[TraceRequest], *, at_once: int) -> Replay:
    """Answer every request greedily, `at_once` of them at any time."""
    engine = llm.engine
    before = (engine.stats.num_cached_tokens, engine.scheduler.num_preemptions)
    waiting = iter(enumerate(requests))
    running: dict[str, tuple[RequestOutput, float]] = {}
    first: dict[str, float] = {}
    started = time.perf_counter()
    for number, request in islice(waiting, at_once):
        running |= _ask(llm, number, request)
    while running:
        engine.step()
        now = time.perf_counter()
        for name, (output, began) in list(running.items()):
            if name not in first and output.completions[0].token_ids:
                first[name] = now - began
            if output.is_finished:
                del running[name]
                for number, request in islice(waiting, 1):
                    running |= _ask(llm, number, request)
    seconds = time.perf_counter() - started
    cached, preempted = engine.stats.num_cached_tokens - before[0], engine.scheduler.num_preemptions - before[1]
    num_prompt, num_output = sum(len(r.prompt) for r in requests), sum(r.num_output for r in requests)
    repeated = _num_repeated(requests, engine.options.block_size)
    return Replay(len(requests), num_prompt, num_output, cached, repeated, preempted, seconds, sorted(first.values()))


def _ask(llm: LLM, number: int, request: TraceRequest) -> dict[str, tuple[RequestOutput, float]]:
    settings = SamplingParams(max_tokens=request.num_output, temperature=0, ignore_eos=True)
    output = llm.engine.add(request.prompt, settings, request_id=f"trace-{number}")
    return {output.id: (output, time.perf_counter())}


def _num_repeated(requests: list[TraceRequest], block_size: int) -> int:
    """Tokens of full blocks that an earlier prompt began with too."""
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for request in requests:
        starts = [tuple(request.prompt[:end]) for end in range(block_size, len(request.prompt), block_size)]
        repeated += block_size * next((i for i, start in enumerate(starts) if start not in seen), len(starts))
        seen |= set(starts)
    return repeated


def _rows(path: Path) -> Iterator[tuple[int, int, list[int] | None]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix == ".csv":
                for row in csv.DictReader(file):
                    yield int(row["ContextTokens"]), int(row["GeneratedTokens"]), None
            else:
                for line in file:
                    row = json.loads(line)
                    yield int(row["input_length"]), int(row["output_length"]), list(row["hash_ids"])
        except (KeyError, ValueError, TypeError) as error:
            forms = "JSON lines with input_length, output_length and hash_ids, or CSV with ContextTokens and GeneratedTokens"
            raise UsageError(f"{path} is no trace that is read here ({forms}): {error}") from error
