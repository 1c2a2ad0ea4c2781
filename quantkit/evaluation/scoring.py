"""The whole of `quantkit eval --tasks`: open the tasks, let one model after the other answer them, compare document by document."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from tqdm import tqdm

from quantkit.checkpoint.source import resolve
from quantkit.errors import Interrupted, UsageError, did_you_mean
from quantkit.evaluation import results
from quantkit.evaluation.answers import AnswerFile, RememberingLM
from quantkit.evaluation.fingerprint import model_fingerprint
from quantkit.evaluation.lm import EngineLM
from quantkit.evaluation.paired import TaskRun, task_scores
from quantkit.evaluation.suite import SuiteTask
from quantkit.evaluation.task_data import TaskData
from quantkit.evaluation.tasks import OpenTasks, open_tasks
from quantkit.models.device import find_device
from quantkit.ops import Mode
from quantkit.paths import cache_folder
from quantkit.runtime.llm import LLM

_BOOTSTRAPS = 10_000


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """How the models are run; every default is the recommended choice.

    Attributes:
        mode, device, context: of both models.
        quantization, kv_cache_dtype: of the model alone, as EngineOptions has them; the baseline runs as it is.
        chat: put prompts into the model's chat template, examples as turns.
        data_dir: local files of MMLU and GSM8K.
        is_partial_data: those files may hold fewer rows than the task has.
        cache_dir: where answers are kept; None for the user's cache.
        is_fresh: ask everything anew.
        runs_unsafe_code: take tasks that run what the model writes.
    """

    mode: Mode = "fast"
    device: str = "auto"
    context: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    chat: bool = False
    data_dir: Path | None = None
    is_partial_data: bool = False
    cache_dir: Path | None = None
    is_fresh: bool = False
    runs_unsafe_code: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode {self.mode!r}; {did_you_mean(self.mode, get_args(Mode))}")
        if self.is_partial_data and self.data_dir is None:
            raise UsageError("--partial-data is about the files of --data-dir; give that too")


def score(
    model: str, tasks: tuple[SuiteTask, ...], *, baseline: str | None = None, options: ScoringOptions | None = None, suite: str | None = None,
    command: str = "",
) -> results.ScoreReport:  # fmt: skip
    """Let a model, and its baseline first, answer tasks.

    Args:
        model, baseline: folders, hub ids, or "reference"; quantized or not.
        suite, command: said in the report.

    Raises:
        UsageError: a task or a data file is not what it should be.
        SourceError: a model or a task's data cannot be had.
        Interrupted: Ctrl-C; answers so far are kept.
    """
    options = options or ScoringOptions()
    sources = [source for source in (baseline, model) if source is not None]
    folders = [resolve(source, trust_remote_code=options.trust_remote_code).folder for source in sources]
    with tuned_lm_eval():
        data = TaskData(options.data_dir, is_partial=options.is_partial_data) if options.data_dir else None
        opened = open_tasks(tasks, data=data, runs_unsafe_code=options.runs_unsafe_code)
        done = [
            _run(source, folder, opened, options, is_baseline=number < len(sources) - 1)
            for number, (source, folder) in enumerate(zip(sources, folders, strict=True))
        ]
        scores = task_scores(done[-1][0], done[0][0] if baseline is not None else None, opened.groups)
    settings = results.Settings(
        mode=options.mode, device=str(find_device(options.device)), context=options.context, quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype, chat_template=options.chat,
    )  # fmt: skip
    return results.ScoreReport(
        date=results.now(), command=command, machine=results.machine(), versions=results.versions(), suite=suite,
        is_partial_data=options.is_partial_data, settings=settings, model=done[-1][1], baseline=done[0][1] if baseline is not None else None,
        scores=scores,
    )  # fmt: skip


def _run(source: str, folder: Path, tasks: OpenTasks, options: ScoringOptions, *, is_baseline: bool) -> tuple[TaskRun, results.ScoredModel]:
    """One model's answers; its memory is free again afterwards."""
    started, fingerprint = time.monotonic(), model_fingerprint(folder)
    engine: dict[str, Any] = {"mode": options.mode, "device": options.device, "context": options.context}
    if not is_baseline:
        engine |= {"quantization": options.quantization, "kv_cache_dtype": options.kv_cache_dtype}
    lm, answers = _remembering(source, fingerprint, engine, options)
    try:
        _seed()
        raw = evaluate(
            lm, tasks.to_lm_eval(), samples=dict(tasks.documents) or None, bootstrap_iters=_BOOTSTRAPS, apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat, confirm_run_unsafe_code=options.runs_unsafe_code,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; answers so far are kept in {answers.path}, and the same command goes on with them") from stop
    finally:
        answers.close()
    model = results.ScoredModel(
        source=source, fingerprint=fingerprint, num_requests=lm.num_asked, num_known=lm.num_known, num_cut=lm.num_cut,
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip
    del lm
    gc.collect()
    assert raw is not None
    return TaskRun(raw), model


def _remembering(source: str, fingerprint: str, engine: dict[str, Any], options: ScoringOptions) -> tuple[RememberingLM, AnswerFile]:
    versions = results.versions()
    identity = {
        "model": fingerprint, **{"quantization": None, "kv_cache_dtype": "auto"}, **engine, "device": str(find_device(options.device)),
        **{name: getattr(versions, name) for name in ("quantkit", "torch", "transformers")},
    }  # fmt: skip
    answers = AnswerFile(options.cache_dir or cache_folder("answers"), identity, is_fresh=options.is_fresh)
    return RememberingLM(lambda: EngineLM(LLM(source, **engine, trust_remote_code=options.trust_remote_code)), answers), answers


def _seed() -> None:
    """lm-eval's own seeds, for tasks that draw."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


def _bar_on_terminals(*args: Any, **settings: Any) -> tqdm:
    return tqdm(*args, **settings | {"disable": settings.get("disable") or None})


@contextmanager
def tuned_lm_eval() -> Iterator[None]:
    """Without lm-eval's warnings of what is meant here and its progress bar for each task's prompts, both 57 lines for MMLU, nor bars in files.

    Its prompt templates are compiled once, not once a document, which takes longer than a small model's answers.
    """
    logger, environment = logging.getLogger("lm_eval"), lm_eval.utils.env
    level, bars, compiled = logger.level, (lm_eval.api.task.tqdm, lm_eval.api.model.tqdm), environment.from_string
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm, lm_eval.api.model.tqdm = partial(bars[0], disable=True), _bar_on_terminals
    environment.from_string = lru_cache(maxsize=1024)(compiled)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm, lm_eval.api.model.tqdm = bars
        environment.from_string = compiled
