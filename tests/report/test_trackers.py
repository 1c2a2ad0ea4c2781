"""Figures arrive where people keep their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.report.trackers import figures, to_tensorboard, to_wandb
from tests.report.test_check import report_of, speed_result, task_result, text_result

FIGURES = {
    "size/bytes": 400.0, "size/of_original": 0.4, "size/bits_per_weight": 4.1, "text/kl_mean": 0.02, "recovery/quiz_acc": 0.99, "speed/ratio_8": 1.5,
}  # fmt: skip


def test_tensorboard_has_a_run_for_each_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = report_of(text=text_result(0.02, 1e-4), tasks=task_result(10, 0), speed=speed_result(1.5, 1, 2))

    to_tensorboard(report, tmp_path)

    events = accumulator.EventAccumulator(str(tmp_path / "small"))
    events.Reload()
    found = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert FIGURES.items() <= {name: pytest.approx(value, rel=1e-6) for name, value in found.items()}.items()
    assert found == {name: pytest.approx(value, rel=1e-6) for name, value in figures(report.checkpoints[0], report.baseline)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_keeps_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    to_wandb(report_of(text=text_result(0.02, 1e-4)), "tests", tmp_path)
    wandb.teardown()  # its own process writes the file, at the latest when it ends, as at the end of every program

    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert b"text/kl_mean" in log.read_bytes()


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)

    with pytest.raises(UsageError, match=r"quantkit\[track\]"):
        to_wandb(report_of(), "tests", tmp_path)
