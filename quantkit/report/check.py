"""A report against what was found before: what moved, by how much, whether beyond what is allowed, and whether beyond noise.

A figure fails where it is worse than the committed one by more than its limit and by more than chance explains. What only one of the two says is
shown and passes. Figures that the committed file has and the report lacks fail too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from quantkit.evaluation.document import Document, Part
from quantkit.evaluation.results import TaskScore
from quantkit.ops import Mode
from quantkit.report.schema import KINDS, CheckpointResult, Kind, Provenance, Report

Verdict = Literal["same", "better", "within limit", "within noise", "worse", "missing"]
_SIGMAS = 2


class Limits(Part):
    """How much worse a figure may be than the committed one."""

    kl: float = Field(default=0.1, ge=0, description="share of the committed mean KL divergence")
    recovery: float = Field(default=0.02, ge=0, description="of 1; few documents have wide intervals, and only what is beyond those fails")
    size: float = Field(default=0.01, ge=0, description="share of the committed bytes")
    speed: float = Field(default=0.5, ge=0, lt=1, description="share of the committed ratio to the baseline's speed")
    speed_elsewhere: float = Field(default=0.8, ge=0, lt=1, description="the same on another processor than the committed figures are of")


class Kept(Part):
    """A figure with its standard error, where it has one."""

    value: float
    error: float | None = None


class ExpectedCheckpoint(Part):
    """How a checkpoint is made, and what was found of it."""

    name: str = Field(pattern=r"^\w[\w.+-]*$", description="of its folder")
    recipe: str
    format: str
    num_samples: int = Field(default=32, ge=1, description="calibration rows, where the recipe takes any")
    seq_len: int = Field(default=512, ge=2)
    measured: tuple[Kind, ...] = Field(default=KINDS, description="beside its bytes")
    file_bytes: int | None = None
    kl: Kept | None = None
    recovery: dict[str, float] = Field(default_factory=dict, description="by task and metric")
    speed: dict[int, float] = Field(default_factory=dict, description="output over the baseline's, by requests at once")


class CheckFile(Document):
    """What `quantkit report --check` holds a model to."""

    WHAT: ClassVar[str] = "a file of `quantkit report --check`"
    AGAIN: ClassVar[str] = "make it again with `quantkit ci init`"

    kind: Literal["quantkit-check"] = "quantkit-check"
    schema_version: Literal[1] = 1
    source: str
    text: str | None = Field(default=None, description="a file; null for the reference model's prose")
    seq_len: int | None = Field(default=None, ge=2)
    max_tokens: int | None = Field(default=65_536, ge=1)
    suite: str = "quick"
    requests: tuple[int, ...] = (1, 8)
    mode: Mode = "fast"
    limits: Limits = Field(default_factory=Limits)
    made: Provenance | None = Field(default=None, description="of the figures; null before the first --update")
    checkpoints: list[ExpectedCheckpoint] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> CheckFile:
        names = [each.name for each in self.checkpoints]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} names two checkpoints; give each a name of its own")
        return self

    @property
    def has_figures(self) -> bool:
        return any(each.file_bytes or each.kl or each.recovery or each.speed for each in self.checkpoints)


class Finding(Part):
    """One figure beside the committed one.

    Attributes:
        allowed: the worst value that passes.
        noise: how far chance alone may move it; None where there is no chance in it.
    """

    checkpoint: str
    figure: str
    expected: float
    found: float | None
    allowed: float
    noise: float | None
    verdict: Verdict

    @property
    def has_failed(self) -> bool:
        return self.verdict in ("worse", "missing")

    @property
    def change(self) -> float | None:
        """Relative to the committed value."""
        return None if self.found is None or not self.expected else self.found / self.expected - 1


def check(report: Report, expected: CheckFile) -> list[Finding]:
    """Every committed figure in its order."""
    found = {each.name: each for each in report.checkpoints}
    processor = expected.made and (expected.made.machine.gpu or expected.made.machine.processor)
    return [finding for each in expected.checkpoints for finding in _of_checkpoint(each, found.get(each.name), expected.limits, processor)]


def updated(expected: CheckFile, report: Report, made: Provenance) -> CheckFile:
    """The same file with the report's figures, and none that it does not have: all of a file's are of one run."""
    found = {each.name: each for each in report.checkpoints}
    checkpoints = [_updated(each, found[each.name]) if each.name in found else each for each in expected.checkpoints]
    return expected.model_copy(update={"made": made, "checkpoints": checkpoints})


def recoveries(checkpoint: CheckpointResult) -> dict[str, TaskScore]:
    """What has a recovery, by task and metric; of groups the whole alone."""
    scores = checkpoint.tasks.scores if checkpoint.tasks is not None else []
    kept = [each for each in scores if each.group is None and each.comparison is not None and each.comparison.recovery is not None]
    return {f"{each.task} {each.metric}" + ("" if each.filter == "none" else f" {each.filter}"): each for each in kept}


def _of_checkpoint(expected: ExpectedCheckpoint, found: CheckpointResult | None, limits: Limits, processor: str | None) -> Iterator[Finding]:
    name, machine = expected.name, found.speed.made.machine if found is not None and found.speed is not None else None
    is_elsewhere = machine is not None and (machine.gpu or machine.processor) != processor
    if expected.file_bytes is not None:
        yield _finding(name, "bytes", expected.file_bytes, found and found.file_bytes, limits.size, 0.0, higher_is_worse=True)
    if expected.kl is not None:
        text = found.text.result if found is not None and found.text is not None else None
        noise = None if text is None else _SIGMAS * math.hypot(text.kl_se, expected.kl.error or 0.0)
        yield _finding(name, "KL divergence", expected.kl.value, text and text.kl_mean, limits.kl, noise, higher_is_worse=True)
    scores = recoveries(found) if found is not None else {}
    for task, value in expected.recovery.items():
        comparison = scores[task].comparison if task in scores else None
        own = comparison.recovery if comparison is not None else None
        noise = comparison.recovery_high - own if comparison is not None and own is not None and comparison.recovery_high is not None else None
        yield _finding(name, f"recovery, {task}", value, own, limits.recovery / value if value else 0.0, noise, higher_is_worse=False)
    loads = {load.num_requests: load for load in found.speed.loads} if found is not None and found.speed is not None else {}
    limit = limits.speed_elsewhere if is_elsewhere else limits.speed
    for count, value in expected.speed.items():
        load = loads.get(count)
        noise = None if load is None else load.ratio_high - load.ratio
        yield _finding(name, f"speed ratio, {count} at once", value, load and load.ratio, limit, noise, higher_is_worse=False)


def _finding(name: str, figure: str, expected: float, found: float | None, limit: float, noise: float | None, *, higher_is_worse: bool) -> Finding:
    allowed = expected * (1 + limit if higher_is_worse else 1 - limit)
    verdict: Verdict = "missing"
    if found is not None and math.isfinite(found):
        worse = found - expected if higher_is_worse else expected - found
        is_chance = abs(worse) <= (noise or 0.0)
        if worse == 0:
            verdict = "same"
        elif worse < 0:
            verdict = "within noise" if is_chance else "better"
        elif is_chance:
            verdict = "within noise"
        else:
            verdict = "worse" if worse > abs(expected) * limit else "within limit"
    return Finding(checkpoint=name, figure=figure, expected=expected, found=found, allowed=allowed, noise=noise, verdict=verdict)


def _updated(expected: ExpectedCheckpoint, found: CheckpointResult) -> ExpectedCheckpoint:
    text = found.text.result if found.text is not None else None
    scores = {name: each.comparison.recovery for name, each in recoveries(found).items() if each.comparison is not None}
    loads = {load.num_requests: round(load.ratio, 3) for load in found.speed.loads} if found.speed is not None else {}
    return expected.model_copy(update={
        "file_bytes": found.file_bytes, "kl": Kept(value=text.kl_mean, error=text.kl_se) if text is not None else None, "recovery": scores,
        "speed": loads,
    })  # fmt: skip
