"""Task names to lm-eval's task objects: our own, the official ones on local files, and whatever else lm-eval knows.

lm-eval needs 20 seconds to index all its definitions. The folders of ours, MMLU's and GSM8K's are indexed alone, and the rest only for other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from quantkit.errors import QuantkitError, SourceError, UsageError, did_you_mean
from quantkit.evaluation.suite import SuiteTask
from quantkit.evaluation.task_data import TaskData
from quantkit.paths import packaged

_OFFICIAL = ("mmlu/default", "gsm8k")
_GSM8K, _MMLU = "openai/gsm8k", "cais/mmlu"
_SEED = 1234  # lm-eval's own, so that examples drawn at random are those of its command line


@dataclass(slots=True)
class OpenTasks:
    """lm-eval's objects, ready to be run.

    Attributes:
        documents: which of a task's documents are scored, where not all are.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    documents: dict[str, range] = field(default_factory=dict)

    def to_lm_eval(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "groups": self.groups, "group_map": {name: group.child_names for name, group in self.groups.items()}}


def open_tasks(asked: tuple[SuiteTask, ...], *, data: TaskData | None = None, runs_unsafe_code: bool = False) -> OpenTasks:
    """Find the tasks and read their data.

    Args:
        data: local files for MMLU and GSM8K, in place of the hub's.
        runs_unsafe_code: take tasks that run what the model writes.

    Raises:
        UsageError: a name is unknown or comes twice, a data file is not what the task needs, or there are fewer examples than shots.
        SourceError: a task's data cannot be fetched.
    """
    near, opened = _near_manager(data), OpenTasks()
    for each in asked:
        loaded = _load(each.task, near)
        twice = sorted(set(loaded["tasks"]) & set(opened.tasks))
        if twice:
            raise UsageError(f"task {twice[0]!r} is asked for twice, the second time by {each.task!r}; leave one of them out")
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not runs_unsafe_code:
                raise UsageError(f"task {name!r} runs code that the model writes; in a sandbox, add --run-unsafe-code")
            _set_fewshot(name, task, each.num_fewshot)
            if each.limit is not None:
                opened.documents[name] = range(min(each.limit, len(task.eval_docs)))
        opened.tasks |= loaded["tasks"]
        opened.groups |= loaded["groups"]
    return opened


def _load(name: str, near: TaskManager) -> Any:
    manager = near if name in near.task_index else _whole_manager()
    if name not in manager.task_index:
        raise UsageError(f"unknown task {name!r}; {did_you_mean(name, {*near.all_tasks, *manager.all_tasks})}")
    try:
        return manager.load([name])
    except QuantkitError:
        raise
    except ImportError as error:
        raise UsageError(f"task {name!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        local = "; its files can be given with --data-dir" if name.startswith(("mmlu", "gsm8k")) else ""
        raise SourceError(f"the data of task {name!r} cannot be fetched from the hub: {error}{local}") from error


def _set_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    """As lm-eval's simple_evaluate does: a task that states 0 keeps it, one that states nothing has none."""
    stated = task.get_config("num_fewshot")
    if stated is None or (num_fewshot is not None and stated != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEED)
    wanted = task.get_config("num_fewshot")
    examples = task.fewshot_docs() if wanted else None
    if examples is not None and len(examples) < wanted:
        raise UsageError(f"task {name!r} has {len(examples)} examples, fewer than the {wanted} shots asked for")


@cache
def _whole_manager() -> TaskManager:
    return TaskManager()


def _near_manager(data: TaskData | None) -> TaskManager:
    """Our tasks and the official MMLU and GSM8K, these on local files where there are any."""
    official = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[packaged("evals") / "tasks", *(official / name for name in _OFFICIAL)])
    if data is not None:
        _read_locally(manager.task_index, data)
    return manager


def _read_locally(index: dict[str, Any], data: TaskData) -> None:
    """Give every task of MMLU and GSM8K its local rows; what a partial folder lacks goes."""
    for name, entry in list(index.items()):
        config = entry.cfg or {}
        if config.get("dataset_path") == _GSM8K:
            read: Callable[[], dict[str, list[dict[str, Any]]]] = data.gsm8k
        elif config.get("dataset_path") == _MMLU:
            subject = config["dataset_name"]
            if data.is_partial and not data.has_mmlu(subject):
                _leave_out(index, name)
                continue
            read = _subject(data, subject)
        else:
            continue
        index[name] = replace(entry, yaml_path=None, cfg=config | {"custom_dataset": _as_datasets(read)})


def _leave_out(index: dict[str, Any], name: str) -> None:
    for tag in index.pop(name).tags:
        index[tag].tags.discard(name)
        if not index[tag].tags:
            _leave_out_of_groups(index, tag)


def _leave_out_of_groups(index: dict[str, Any], name: str) -> None:
    """A group none of whose members is left goes with the last one."""
    for group, entry in list(index.items()):
        members = (entry.cfg or {}).get("task")
        if isinstance(members, list) and name in members:
            left = [member for member in members if member != name]
            index[group] = replace(entry, yaml_path=None, cfg=entry.cfg | {"task": left})
            if not left:
                _leave_out_of_groups(index, group)


def _subject(data: TaskData, subject: str) -> Callable[[], dict[str, list[dict[str, Any]]]]:
    return lambda: data.mmlu(subject)


def _as_datasets(read: Callable[[], dict[str, list[dict[str, Any]]]]) -> Callable[..., Any]:
    def dataset(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in read().items()})

    return dataset
