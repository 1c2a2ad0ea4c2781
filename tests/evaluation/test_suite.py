"""Suites are data that is checked whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.evaluation.suite import Suite, SuiteTask
from quantkit.paths import packaged

SHIPPED = sorted(path.stem for path in (packaged("evals") / "suites").glob("*.yaml"))


def test_shipped_suites_are_valid_and_bear_their_names() -> None:
    assert SHIPPED == ["full", "quick", "standard"]
    assert all(Suite.load(name).name == name for name in SHIPPED)
    assert {task.task for task in Suite.load("quick").tasks} == {"reference_mmlu", "reference_gsm8k"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ntasks: [{task: mmlu, shots: 5}]", "unknown key 'tasks.0.shots'"),
        ("name: x\ntask: mmlu\ntasks: [{task: mmlu}]", "unknown key 'task'; did you mean 'tasks'"),
        ("name: x\ntasks: []", "tasks: "),
        ("name: x\ntasks: [{task: mmlu, limit: 0}]", "tasks.0.limit"),
        ("- mmlu", "the file: "),
        ("a: [", "is not YAML"),
    ],
    ids=["unknown key of a task", "unknown key", "no tasks", "limit of none", "a list", "not YAML"],
)
def test_a_suite_that_is_not_valid_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    with pytest.raises(UsageError, match=message):
        Suite.load(str(path))


def test_unknown_suites_are_answered_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown suite 'quik'; did you mean 'quick'"):
        Suite.load("quik")
    with pytest.raises(UsageError, match="cannot be read"):
        Suite.load(str(tmp_path / "none.yaml"))


def test_the_users_numbers_come_first() -> None:
    task = SuiteTask(task="mmlu", num_fewshot=5, limit=40)

    assert task.changed(num_fewshot=0, limit=None) == SuiteTask(task="mmlu", num_fewshot=0, limit=40)
