"""How long lm-eval's tasks take on our runtime and on lm-eval's own Hugging Face class, the same questions by the same evaluate."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from quantkit.checkpoint.source import resolve
from quantkit.evaluation.lm import EngineLM
from quantkit.evaluation.scoring import tuned_lm_eval
from quantkit.evaluation.suite import SuiteTask
from quantkit.evaluation.tasks import open_tasks
from quantkit.ops import Mode
from quantkit.runtime.llm import LLM


@dataclass(frozen=True, slots=True)
class TaskTime:
    """One backend's run.

    Attributes:
        seconds: of evaluate, with the models loaded and the tasks opened.
        score: the first metric of the task, to see that both did the same.
    """

    backend: str
    seconds: float
    score: float


def task_times(source: str, task: SuiteTask, *, mode: Mode, dtype: str, batch_sizes: tuple[int, ...]) -> Iterator[TaskTime]:
    """Ours first, then Hugging Face's in each batch size.

    Args:
        dtype: of Hugging Face's model.

    Raises:
        UsageError: there is no such task.
    """
    folder = str(resolve(source).folder)
    with tuned_lm_eval():  # part of how `quantkit eval` runs, and no part of `lm_eval`
        yield _timed(f"quantkit, {mode}", EngineLM(LLM(folder, mode=mode)), task)
    from lm_eval.models.huggingface import HFLM

    for size in batch_sizes:
        yield _timed(f"lm_eval --model hf, {dtype}, batches of {size}", HFLM(pretrained=folder, dtype=dtype, device="cpu", batch_size=size), task)


def _timed(name: str, lm: LM, task: SuiteTask) -> TaskTime:
    opened = open_tasks((task,))
    started = time.perf_counter()
    found: Any = evaluate(lm, opened.to_lm_eval(), samples=dict(opened.documents) or None, bootstrap_iters=0)
    seconds = time.perf_counter() - started
    results = found.get("groups") or found["results"]
    row = results[task.task]
    score = next(value for key, value in row.items() if "," in key and "_stderr" not in key)
    del lm
    gc.collect()
    return TaskTime(name, seconds, float(score))
