"""A report's figures where people keep their runs: TensorBoard's files, Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import OutputError, UsageError
from quantkit.report.check import recoveries
from quantkit.report.schema import CheckpointResult, Report


def figures(checkpoint: CheckpointResult, baseline: CheckpointResult) -> Iterator[tuple[str, float]]:
    """Name and value of everything that is one number."""
    yield "size/bytes", float(checkpoint.file_bytes)
    yield "size/of_original", checkpoint.file_bytes / max(1, baseline.file_bytes)
    if checkpoint.bits_per_weight is not None:
        yield "size/bits_per_weight", checkpoint.bits_per_weight
    if checkpoint.text is not None:
        result = checkpoint.text.result
        yield from (("text/kl_mean", result.kl_mean), ("text/kl_99.9", result.kl_percentiles["99.9%"]), ("text/top1", result.top1))
        yield "text/ppl_ratio", result.ppl_ratio
    for task, score in recoveries(checkpoint).items():
        found = score.comparison
        assert found is not None and found.recovery is not None
        yield f"recovery/{task.replace(' ', '_')}", found.recovery
    for load in checkpoint.speed.loads if checkpoint.speed is not None else ():
        yield f"speed/output_rate_{load.num_requests}", load.output_rate
        yield f"speed/ratio_{load.num_requests}", load.ratio


def to_tensorboard(report: Report, folder: Path) -> None:
    """A run for each checkpoint, as TensorBoard compares them.

    Raises:
        UsageError: tensorboard is not installed. OutputError: the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs tensorboard; install quantkit[track]") from error
    try:
        for each in report.checkpoints:
            with SummaryWriter(str(folder / each.name)) as writer:
                for name, value in figures(each, report.baseline):
                    writer.add_scalar(name, value, 0)
                writer.add_text("checkpoint", f"{each.source}: {each.container}, {each.schemes}")
    except OSError as error:
        raise OutputError(f"TensorBoard's files cannot be written to {folder}: {error.strerror}") from error


def to_wandb(report: Report, project: str, folder: Path) -> None:
    """A run for each checkpoint in a project; WANDB_MODE=offline leaves them in `folder`.

    Raises:
        UsageError: wandb is not installed, or does not take the runs, such as without a login.
    """
    try:
        import wandb
    except ImportError as error:
        raise UsageError("--wandb needs wandb; install quantkit[track]") from error
    folder.mkdir(parents=True, exist_ok=True)
    for each in report.checkpoints:
        config = {"source": each.source, "container": each.container, "schemes": each.schemes, "baseline": report.baseline.source}
        try:
            with wandb.init(project=project, name=each.name, dir=str(folder), config=config, settings=wandb.Settings(silent=True)) as run:
                run.log(dict(figures(each, report.baseline)))
        except wandb.errors.Error as error:
            hint = "" if os.environ.get("WANDB_MODE") == "offline" else "; set WANDB_MODE=offline to keep the runs on this machine"
            raise UsageError(f"Weights & Biases does not take the runs: {error}{hint}") from error
