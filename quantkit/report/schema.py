"""The report: what was found of any number of checkpoints of one model. `evals/schemas/report.json` is this, written out."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field

from quantkit.core.divergence import DivergenceResult
from quantkit.evaluation.continuations import ContinuationResult
from quantkit.evaluation.document import Document, Part
from quantkit.evaluation.results import Machine, Settings, TaskScore, Versions

Kind = Literal["text", "tasks", "speed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is measured of a checkpoint: what it says of a text, its answers, its speed."""


class Provenance(Part):
    """Where a figure comes from."""

    date: str = Field(description="ISO 8601, UTC")
    command: str
    versions: Versions
    machine: Machine


class LayerError(Part):
    name: str
    scheme: str
    error: float = Field(description="relative squared error, of the layer's output where data was seen, else of its weight")
    note: str | None = Field(default=None, description="where it is stored or rounded otherwise than the recipe asks")
    seen_tokens: int | None = Field(default=None, description="calibration tokens behind its rounding; null where the weight alone was looked at")


class Conversion(Part):
    """What the checkpoint's own account says; only quantkit writes one."""

    recipe: str | None = Field(description="null where nothing was quantized: a quantized original in another container, or decoded")
    seconds: float
    peak_memory_bytes: int
    calibration: str | None
    layers: list[LayerError]
    versions: dict[str, str]
    experts: str | None = Field(default=None, description="how many calibration tokens reached the experts, in words")


class Measured(Part):
    """A result with its origin."""

    made: Provenance
    key: str = Field(description="of all that was asked for and the baseline: results of equal keys are not measured again; empty for those taken in")


class TextResult(Measured):
    """Next-token distributions against the baseline's on the same text."""

    measured_on: str
    seq_len: int
    result: DivergenceResult
    continuations: ContinuationResult | None


class TaskResult(Measured):
    """lm-eval's tasks, answered by both models."""

    suite: str | None
    settings: Settings
    is_partial_data: bool
    scores: list[TaskScore]


class LoadPoint(Part):
    """Requests that came at once: the turn of median output."""

    num_requests: int
    output_rate: float = Field(description="tokens a second over all requests")
    first_token_ms: float = Field(description="median over requests")
    inter_token_ms: float
    baseline_rate: float = Field(description="output of the baseline in the same turns, median")
    ratio: float = Field(description="output over the baseline's, median over turns of both")
    ratio_low: float = Field(description="the lowest of any turn")
    ratio_high: float


class SpeedResult(Measured):
    """Speed in quantkit's runtime, in turns with the baseline."""

    mode: str
    num_prompt: int = Field(description="tokens of each prompt")
    num_output: int
    turns: int
    prompt_rate: float = Field(description="tokens a second of one long prompt")
    loads: list[LoadPoint]
    bytes_per_token: int = Field(description="weights that one token of one request reads")
    bandwidth: float = Field(description="bytes a second that this machine reads")

    @property
    def limit(self) -> float:
        """Tokens a second of one request that the memory allows."""
        return self.bandwidth / self.bytes_per_token


class CheckpointResult(Part):
    """A checkpoint, and all that is known of it."""

    name: str
    source: str
    fingerprint: str = Field(description="sha256 over configuration, tokenizer and weights")
    container: str
    schemes: dict[str, int] = Field(description="layers by scheme")
    file_bytes: int
    bits_per_weight: float | None = Field(description="of the quantized layers, scales included")
    conversion: Conversion | None = None
    text: TextResult | None = None
    tasks: TaskResult | None = None
    speed: SpeedResult | None = None


class Report(Document):
    """What `quantkit report` collected."""

    WHAT: ClassVar[str] = "a report of `quantkit report`"
    AGAIN: ClassVar[str] = "make it again"

    kind: Literal["quantkit-report"] = "quantkit-report"
    schema_version: Literal[1] = 1
    date: str
    command: str
    versions: Versions
    baseline: CheckpointResult
    checkpoints: list[CheckpointResult]
