"""A model's speed beside its baseline's, in turns, so that what slows the machine slows both: prompts, output, and latency under load."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from quantkit.bench.engine import first_token, make_prompts
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams

_WARM_UP = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that come at once.

    Attributes:
        output_rate: tokens a second over all of them, from the first prompt in to the last token out.
        first_token_ms, inter_token_ms: medians over requests.
    """

    num_requests: int
    output_rate: float
    first_token_ms: float
    inter_token_ms: float


@dataclass(frozen=True, slots=True)
class Speed:
    """One model's turns.

    Attributes:
        prompt_rate: tokens a second of one long prompt, by turn.
        loads: by number of requests, by turn.
    """

    prompt_rate: tuple[float, ...]
    loads: dict[int, tuple[Load, ...]]

    def median(self, num_requests: int) -> Load:
        """The turn of median output."""
        return sorted(self.loads[num_requests], key=lambda load: load.output_rate)[len(self.prompt_rate) // 2]


def measure(models: list[LLM], *, requests: tuple[int, ...], num_prompt: int, num_output: int, turns: int) -> list[Speed]:
    """The speed of every model, one turn of each after the other.

    Args:
        requests: numbers of requests at once.
        num_prompt, num_output: tokens of each; prompts are random ids.
    """
    prompt_rates: list[list[float]] = [[] for _ in models]
    loads: list[dict[int, list[Load]]] = [{count: [] for count in requests} for _ in models]
    for llm in models:
        first_token(llm, make_prompts(1, _WARM_UP, llm.engine.loaded.vocabulary, seed=1)[0])
    for turn in range(turns):
        for number, llm in enumerate(models):
            vocabulary = llm.engine.loaded.vocabulary
            length = min(4 * num_prompt, llm.engine.scheduler.max_length - 1)
            prompt_rates[number].append(length / first_token(llm, make_prompts(1, length, vocabulary, seed=1000 + turn)[0]))
            for count in requests:
                loads[number][count].append(_load(llm, make_prompts(count, num_prompt, vocabulary, seed=2000 + 100 * turn + count), num_output))
    return [Speed(tuple(rates), {count: tuple(found) for count, found in own.items()}) for rates, own in zip(prompt_rates, loads, strict=True)]


def ratios(model: Speed, baseline: Speed, num_requests: int) -> tuple[float, float, float]:
    """Output of the model over the baseline's: the median over turns, the lowest and the highest."""
    found = sorted(own.output_rate / other.output_rate for own, other in zip(model.loads[num_requests], baseline.loads[num_requests], strict=True))
    return statistics.median(found), found[0], found[-1]


def _load(llm: LLM, prompts: list[list[int]], num_output: int) -> Load:
    engine, started = llm.engine, time.perf_counter()
    params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
    outputs = [engine.add(prompt, params, request_id=f"speed-{i}") for i, prompt in enumerate(prompts)]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while engine.has_work:
        for output in engine.step():
            now = time.perf_counter()
            if output.completions[0].token_ids:
                first.setdefault(output.id, now)
            last[output.id] = now
    gaps = [(last[output.id] - first[output.id]) / max(1, num_output - 1) for output in outputs]
    return Load(
        len(prompts), len(prompts) * num_output / (max(last.values()) - started),
        1000 * statistics.median(first[output.id] - started for output in outputs), 1000 * statistics.median(gaps),
    )  # fmt: skip
