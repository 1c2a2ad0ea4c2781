"""Measuring a checkpoint against its baseline: its text, its answers, its speed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import torch

from quantkit.bench.bandwidth import read_bandwidth
from quantkit.bench.speed import Speed, measure, ratios
from quantkit.errors import UsageError, did_you_mean
from quantkit.evaluation import results
from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
from quantkit.evaluation.scoring import ScoringOptions, score
from quantkit.evaluation.suite import Suite
from quantkit.models.compare import Progress
from quantkit.models.device import find_device
from quantkit.ops import Mode
from quantkit.report.describe import bytes_per_token
from quantkit.report.schema import KINDS, LoadPoint, Provenance, SpeedResult, TaskResult, TextResult
from quantkit.runtime.llm import LLM


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What to measure, and how; every default is the recommended choice.

    Attributes:
        kinds: of "text" (KL divergence, perplexity, greedy continuations), "tasks" (a suite of lm-eval's), "speed".
        text, seq_len, max_tokens: as EvaluationOptions has them.
        suite, data_dir: as `quantkit eval` takes them.
        requests: at once, for each point of load.
        num_prompt, num_output: tokens of each request that is timed.
        turns: how often model and baseline take turns.
        mode: of the runtime, for answers and speed.
        cache_dir: where answers and states are kept; None for the user's cache.
        is_fresh: what is kept there is not used.
    """

    kinds: tuple[str, ...] = KINDS
    text: Path | None = None
    seq_len: int | None = None
    max_tokens: int | None = 65_536
    suite: str = "quick"
    data_dir: Path | None = None
    requests: tuple[int, ...] = (1, 4, 16)
    num_prompt: int = 128
    num_output: int = 32
    turns: int = 3
    mode: Mode = "fast"
    device: str = "auto"
    cache_dir: Path | None = None
    is_fresh: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"{kind!r} cannot be measured; {did_you_mean(kind, KINDS)}")
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode {self.mode!r}; {did_you_mean(self.mode, get_args(Mode))}")


def settings_key(kind: str, options: MeasureOptions, baseline: str) -> str:
    """Of all that decides a result of this kind beside the checkpoint.

    Args:
        baseline: its fingerprint.
    """
    versions = results.versions()
    asked: dict[str, object] = {"baseline": baseline, "device": str(find_device(options.device)), "quantkit": versions.quantkit}
    if kind == "text":
        text = hashlib.sha256(options.text.read_bytes()).hexdigest() if options.text is not None and options.text.is_file() else None
        asked |= {"text": text, "seq_len": options.seq_len, "max_tokens": options.max_tokens}
    elif kind == "tasks":
        asked |= {"suite": Suite.load(options.suite).model_dump(), "mode": options.mode, "data": options.data_dir and str(options.data_dir.resolve())}
        asked |= {"lm_eval": versions.lm_eval}
    else:
        machine = results.machine()
        asked |= {name: getattr(options, name) for name in ("mode", "requests", "num_prompt", "num_output", "turns")}
        asked |= {"machine": machine.gpu or machine.processor, "threads": machine.threads, "torch": versions.torch}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def provenance(command: str) -> Provenance:
    return Provenance(date=results.now(), command=command, versions=results.versions(), machine=results.machine())


def measure_text(
    source: str, baseline: str, options: MeasureOptions, command: str, fingerprint: str, progress: Progress | None = None
) -> TextResult:  # fmt: skip
    """`fingerprint` is the baseline's. Raises what `evaluate` raises: models of unlike vocabularies, broken weights."""
    asked = EvaluationOptions(
        text=options.text, seq_len=options.seq_len, max_tokens=options.max_tokens, device=options.device, with_continuations=True,
        cache_dir=options.cache_dir, is_fresh=options.is_fresh, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    found = evaluate(source, baseline=baseline, options=asked, progress=progress)
    assert found.divergence is not None
    return TextResult(
        made=provenance(command), key=settings_key("text", options, fingerprint), measured_on=found.measured_on, seq_len=found.seq_len,
        result=found.divergence, continuations=found.continuations,
    )  # fmt: skip


def measure_tasks(source: str, baseline: str, options: MeasureOptions, command: str, fingerprint: str) -> TaskResult:
    """Raises what `score` raises; answers that are kept are not asked for again."""
    suite = Suite.load(options.suite)
    asked = ScoringOptions(
        mode=options.mode, device=options.device, data_dir=options.data_dir, cache_dir=options.cache_dir, is_fresh=options.is_fresh,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    found = score(source, suite.tasks, baseline=baseline, options=asked, suite=options.suite, command=command)
    return answers_of(found, key=settings_key("tasks", options, fingerprint))


def answers_of(found: results.ScoreReport, *, key: str) -> TaskResult:
    """What an evaluation found, as part of a report."""
    made = Provenance(date=found.date, command=found.command, versions=found.versions, machine=found.machine)
    return TaskResult(made=made, key=key, suite=found.suite, settings=found.settings, is_partial_data=found.is_partial_data, scores=found.scores)


def measure_speed(source: str, baseline: str, options: MeasureOptions, command: str, fingerprint: str) -> SpeedResult:
    """In turns with the baseline. Both are in memory."""
    settings = {"mode": options.mode, "device": options.device, "trust_remote_code": options.trust_remote_code, "prefix_caching": False}
    models = [LLM(each, **settings, max_sequences=max(options.requests)) for each in (baseline, source)]
    shorter = min(llm.engine.scheduler.max_length for llm in models)
    num_output = min(options.num_output, shorter // 4)
    num_prompt = min(options.num_prompt, shorter // 4)
    base, own = measure(models, requests=options.requests, num_prompt=num_prompt, num_output=num_output, turns=options.turns)
    return SpeedResult(
        made=provenance(command), key=settings_key("speed", options, fingerprint), mode=options.mode, num_prompt=num_prompt, num_output=num_output,
        turns=options.turns, prompt_rate=sorted(own.prompt_rate)[len(own.prompt_rate) // 2],
        loads=[_load_point(own, base, count) for count in options.requests],
        bytes_per_token=bytes_per_token(source, trust_remote_code=options.trust_remote_code), bandwidth=_bandwidth(find_device(options.device)),
    )  # fmt: skip


def _load_point(speed: Speed, base: Speed, count: int) -> LoadPoint:
    load, (ratio, low, high) = speed.median(count), ratios(speed, base, count)
    return LoadPoint(
        num_requests=count, output_rate=load.output_rate, baseline_rate=base.median(count).output_rate, ratio=ratio, ratio_low=low, ratio_high=high,
        first_token_ms=load.first_token_ms, inter_token_ms=load.inter_token_ms,
    )  # fmt: skip


@cache
def _bandwidth(device: torch.device) -> float:
    """Measured once, so that all limits of a report are of one machine's one number."""
    return read_bandwidth(device)
