"""What a model of lm-eval's says, document by document, to compare two of them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from quantkit.evaluation.scoring import tuned_lm_eval
from quantkit.evaluation.suite import SuiteTask
from quantkit.evaluation.task_data import TaskData
from quantkit.evaluation.tasks import open_tasks


def results_by_document(lm: LM, task: SuiteTask, data: TaskData | None = None, *, chat: bool = False) -> dict[tuple[str, int], list[Any]]:
    """What a model said of every document of a task: log-likelihoods of the choices, or texts as they are filtered."""
    with tuned_lm_eval():
        opened = open_tasks((task,), data=data)
        found: Any = evaluate(
            lm, opened.to_lm_eval(), samples=dict(opened.documents) or None, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
        )
    return {
        (name, row["doc_id"]): [each[0] if isinstance(each, tuple | list) else each for each in row["filtered_resps"]]
        for name, rows in found["samples"].items()
        for row in rows
    }
