"""Two runs of the same tasks, document by document: what each task and group scored, and whether a difference is real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.evaluation.results import Comparison, Score, TaskScore
from quantkit.evaluation.significance import compare_scores

Documents = dict[int, float]
Metric = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What lm-eval's evaluate returned, read."""

    raw: dict[str, Any]

    def metrics(self, name: str) -> Iterator[Metric]:
        """Metric and filter of everything a task or group scored."""
        for key in self.raw["results"].get(name, {}):
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                yield metric, filtered

    def score(self, name: str, metric: Metric) -> Score:
        row = self.raw["results"][name]
        error = row.get(f"{metric[0]}_stderr,{metric[1]}")
        return Score(value=float(row[",".join(metric)]), standard_error=float(error) if isinstance(error, int | float) else None)

    def documents(self, task: str, metric: Metric) -> Documents | None:
        """Scores by document; None for metrics whose value is not a mean of them."""
        found = {row["doc_id"]: row[metric[0]] for row in self.raw["samples"][task] if row["filter"] == metric[1] and metric[0] in row}
        if not found or not all(isinstance(value, int | float) for value in found.values()):
            return None
        mean = sum(found.values()) / len(found)
        return {number: float(value) for number, value in found.items()} if abs(mean - self.score(task, metric).value) < 1e-9 else None

    def leaves(self, name: str) -> list[str]:
        """The tasks of a group, or the task itself."""
        children = self.raw["group_subtasks"].get(name)
        return [name] if children is None else [leaf for child in children for leaf in self.leaves(child)]


def task_scores(run: TaskRun, baseline: TaskRun | None, groups: dict[str, Any]) -> list[TaskScore]:
    """Every metric of every task and group, a group before its members.

    Args:
        groups: lm-eval's groups by name.
    """
    subtasks = run.raw["group_subtasks"]
    parents = {child: group for group, children in subtasks.items() for child in children}

    def order(name: str) -> Iterator[str]:
        yield name
        for child in subtasks.get(name, ()):
            yield from order(child)

    names = [each for top in [*groups, *run.raw["samples"]] if top not in parents for each in order(top)]
    return [
        _task_score(run, baseline, name, metric, parents.get(name), _is_weighted(groups.get(name), metric[0]))
        for name in names
        for metric in run.metrics(name)
    ]


def _task_score(run: TaskRun, baseline: TaskRun | None, name: str, metric: Metric, parent: str | None, is_weighted: bool) -> TaskScore:
    raw, leaves = run.raw, run.leaves(name)
    is_better_high = raw["higher_is_better"].get(leaves[0], {}).get(metric[0]) is not False
    pairs = _pairs(run, baseline, leaves, metric, is_weighted) if baseline is not None and is_better_high else None
    shots = {raw["n-shot"].get(leaf) for leaf in leaves}
    sizes = [raw["n-samples"][leaf] for leaf in leaves]
    return TaskScore(
        task=name, group=parent, is_group=name in raw["group_subtasks"], metric=metric[0], filter=metric[1], higher_is_better=is_better_high,
        num_fewshot=shots.pop() if len(shots) == 1 else None, version=str(raw["versions"].get(name)),
        num_documents=sum(size["effective"] for size in sizes), num_available=sum(size["original"] for size in sizes),
        score=run.score(name, metric), baseline=baseline.score(name, metric) if baseline is not None else None,
        comparison=Comparison(**compare_scores(*pairs).to_dict()) if pairs else None,
    )  # fmt: skip


def _pairs(run: TaskRun, baseline: TaskRun, leaves: list[str], metric: Metric, is_weighted: bool) -> tuple[list[float], list[float]] | None:
    """Both models' scores, baseline first, of the same documents; None where a task has no scores of documents.

    Where a group's value is the mean of its tasks' means, a document counts by the inverse of its task's size, so that the mean of all is that value.
    """
    sides: tuple[list[float], list[float]] = [], []
    tables = [(baseline.documents(leaf, metric), run.documents(leaf, metric)) for leaf in leaves]
    if not all(left and right and left.keys() == right.keys() for left, right in tables):
        return None
    count = sum(len(left) for left, _ in tables)
    for left, right in tables:
        weight = 1.0 if is_weighted else count / (len(tables) * len(left))
        sides[0].extend(weight * left[number] for number in left)
        sides[1].extend(weight * right[number] for number in left)
    return sides


def _is_weighted(group: Any, metric: str) -> bool:
    """Whether a group's value is a mean over documents, not over tasks."""
    return all(each.weight_by_size for each in (group.aggregate_metric_list or ()) if each.metric == metric) if group is not None else True
