"""The results file of `quantkit eval --tasks`; `evals/schemas/scores.json` is its schema, written out."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

import quantkit
from quantkit.evaluation.document import Document, Part


class Machine(Part):
    system: str
    processor: str
    num_processors: int = Field(description="logical processors of the machine")
    threads: int = Field(description="threads of torch in this run")
    gpu: str | None = None


class Versions(Part):
    quantkit: str
    torch: str
    transformers: str
    lm_eval: str
    python: str


class Settings(Part):
    """How the models were run."""

    mode: str
    device: str
    context: int | None = Field(description="tokens of prompt and answer; null for the model's own")
    quantization: str | None = Field(description="of the model while it was loaded; the baseline is never quantized so")
    kv_cache_dtype: str = Field(description="of the model; the baseline has its own")
    chat_template: bool


class ScoredModel(Part):
    source: str
    fingerprint: str = Field(description="sha256 over configuration, tokenizer and weights")
    num_requests: int
    num_known: int = Field(description="requests that an earlier run had answered")
    num_cut: int = Field(description="requests longer than the context, which lost their beginning")
    seconds: float


class Score(Part):
    value: float
    standard_error: float | None


class Comparison(Part):
    """A paired comparison over the same documents, in the score's own unit; quantkit.evaluation.significance says how."""

    num_documents: int
    baseline: float
    quantized: float
    difference: float = Field(description="quantized minus baseline")
    low: float = Field(description="of the difference's 95% interval")
    high: float
    p_value: float
    recovery: float | None = Field(description="quantized over baseline; null where the baseline scores nothing")
    recovery_low: float | None
    recovery_high: float | None
    detectable: float = Field(description="the smallest true difference that a sample like this shows with a probability of 0.8")
    is_real: bool
    verdict: str


class TaskScore(Part):
    """One metric of one task or group."""

    task: str
    group: str | None = Field(description="the group it is a part of")
    is_group: bool
    metric: str
    filter: str = Field(description="lm-eval's filter of the answers; none where there is one only")
    higher_is_better: bool
    num_fewshot: int | None = Field(description="null for a group whose tasks differ")
    version: str = Field(description="of the task's definition")
    num_documents: int
    num_available: int = Field(description="documents that the task has")
    score: Score
    baseline: Score | None
    comparison: Comparison | None = Field(description="null without a baseline, and for metrics that are not a mean over documents")


class ScoreReport(Document):
    """What one run of `quantkit eval --tasks` found."""

    WHAT: ClassVar[str] = "a results file of `quantkit eval --tasks`"
    AGAIN: ClassVar[str] = "run the evaluation again (answers that are still kept are not asked for again)"

    kind: Literal["quantkit-scores"] = "quantkit-scores"
    schema_version: Literal[1] = 1
    date: str = Field(description="ISO 8601, UTC")
    command: str
    machine: Machine
    versions: Versions
    suite: str | None
    is_partial_data: bool = Field(description="local files may have held fewer documents than the task has")
    settings: Settings
    model: ScoredModel
    baseline: ScoredModel | None
    scores: list[TaskScore]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> Versions:
    return Versions(
        quantkit=quantkit.__version__, torch=torch.__version__, transformers=version("transformers"), lm_eval=version("lm_eval"),
        python=platform.python_version(),
    )  # fmt: skip


def machine() -> Machine:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(system=platform.platform(), processor=_processor(), num_processors=os.cpu_count() or 1, threads=torch.get_num_threads(), gpu=gpu)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
