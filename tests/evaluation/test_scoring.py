"""Tasks through quantkit's runtime: document by document what lm-eval's own backend answers, on shipped, local and unknown tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import jsonschema
import lm_eval
from lm_eval.tasks import TaskManager

from quantkit.checkpoint.source import resolve
from quantkit.errors import Interrupted, SourceError, UsageError
from quantkit.evaluation import scoring, tasks
from quantkit.evaluation.lm import EngineLM
from quantkit.evaluation.results import ScoreReport
from quantkit.evaluation.scoring import ScoringOptions, score
from quantkit.evaluation.suite import Suite, SuiteTask
from quantkit.evaluation.task_data import TaskData
from quantkit.paths import packaged
from quantkit.runtime.llm import LLM
from tests.evaluation.test_task_data import PROBLEM, mmlu

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 3


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Both of the reference model's tasks by lm-eval's own function, manager and Hugging Face backend."""
    return lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(resolve("reference").folder), "dtype": "float32"}, device="cpu", batch_size=4, bootstrap_iters=0,
        tasks=["reference_mmlu", "reference_gsm8k"], num_fewshot=2, limit=LIMIT,
        task_manager=TaskManager(include_defaults=False, include_path=str(packaged("evals") / "tasks")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same by `score`: what lm-eval's evaluate returned, kept on its way."""
    kept: list[dict[str, Any]] = []
    true = scoring.evaluate

    def keep(*arguments: Any, **settings: Any) -> Any:
        kept.append(true(*arguments, **settings))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "evaluate", keep)
        asked = tuple(SuiteTask(task=name, num_fewshot=2, limit=LIMIT) for name in ("reference_mmlu", "reference_gsm8k"))
        score("reference", asked, options=ScoringOptions(mode="exact", cache_dir=tmp_path_factory.mktemp("answers")))
    return kept[0]


def rows(run: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    found = [row | {"task": name} for name, samples in run["samples"].items() if name.startswith(prefix) for row in samples]
    return sorted(found, key=lambda row: (row["task"], row["doc_id"], row["filter"]))


def test_questions_are_answered_as_by_lm_evals_own_backend(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    pairs = list(zip(rows(ours, "reference_mmlu"), rows(theirs, "reference_mmlu"), strict=True))

    assert len(pairs) == 12 * LIMIT
    for mine, other in pairs:
        assert (mine["task"], mine["doc_hash"], mine["prompt_hash"], mine["acc"]) == (
            other["task"], other["doc_hash"], other["prompt_hash"], other["acc"],
        )  # fmt: skip
        for (a, greedy_a), (b, greedy_b) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert abs(a - b) <= 1e-3 and greedy_a == greedy_b
    assert ours["groups"]["reference_mmlu"]["acc,none"] == theirs["groups"]["reference_mmlu"]["acc,none"]


def test_word_problems_are_answered_in_the_same_words(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    pairs = list(zip(rows(ours, "reference_gsm8k"), rows(theirs, "reference_gsm8k"), strict=True))

    assert len(pairs) == 2 * LIMIT
    for mine, other in pairs:
        assert mine["prompt_hash"] == other["prompt_hash"] and mine["resps"] == other["resps"] and mine["exact_match"] == other["exact_match"]
    assert all("#### " in mine["resps"][0][0] for mine, _ in pairs)


def test_a_model_that_is_its_baseline_has_lost_nothing(tmp_path: Path) -> None:
    asked, options = (SuiteTask(task="reference_mmlu", limit=2),), ScoringOptions(cache_dir=tmp_path)

    report = score("reference", asked, baseline="reference", options=options)

    whole, *subjects = report.scores
    assert (whole.task, whole.is_group, whole.num_documents, whole.num_available, len(subjects)) == ("reference_mmlu", True, 24, 1008, 12)
    assert whole.comparison is not None and whole.comparison.difference == 0 and not whole.comparison.is_real
    assert whole.comparison.recovery == 1 and whole.comparison.verdict.startswith("no loss detectable above")
    assert whole.comparison.quantized == pytest.approx(whole.score.value) and {row.group for row in subjects} == {"reference_mmlu"}
    assert report.model.num_known == report.model.num_requests == 96 and report.baseline is not None and report.baseline.num_known == 0


def test_an_interrupted_run_goes_on_with_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, options = (SuiteTask(task="reference_gsm8k", num_fewshot=0, limit=3),), ScoringOptions(cache_dir=tmp_path, mode="exact")
    true, done = EngineLM._run, []

    def stopped(self: EngineLM, prompts: Any, what: str, is_quiet: bool, keep: Any) -> Any:
        def then(number: int, output: Any) -> None:
            keep(number, output)
            done.append(number)
            if len(done) == 1:
                raise KeyboardInterrupt

        return true(self, prompts, what, is_quiet, then)

    with monkeypatch.context() as patch:
        patch.setattr(EngineLM, "_run", stopped)
        with pytest.raises(Interrupted, match="answers so far are kept"):
            score("reference", asked, options=options)

    report = score("reference", asked, options=options)

    assert (report.model.num_requests, report.model.num_known) == (3, 1)
    whole = score("reference", asked, options=ScoringOptions(cache_dir=tmp_path / "other", mode="exact"))
    assert report.scores == whole.scores


def test_prompts_longer_than_the_context_are_counted_also_when_they_are_remembered(tmp_path: Path) -> None:
    asked, options = (SuiteTask(task="reference_mmlu", num_fewshot=5, limit=1),), ScoringOptions(cache_dir=tmp_path, context=160)

    first, again = (score("reference", asked, options=options).model for _ in range(2))

    assert 0 < first.num_cut <= 48 and again.num_cut == first.num_cut and again.num_known == 48


def test_official_mmlu_and_gsm8k_run_on_local_files(tmp_path: Path) -> None:
    mmlu(tmp_path, letters=True, header=None)
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 5), ("test", 2)):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(PROBLEM) + "\n" for _ in range(count)))
    asked = (SuiteTask(task="mmlu", num_fewshot=5, limit=2), SuiteTask(task="gsm8k", limit=1))

    report = score("reference", asked, options=ScoringOptions(data_dir=tmp_path, is_partial_data=True, cache_dir=tmp_path / "answers"), suite="mine")

    assert [(row.task, row.group, row.num_fewshot, row.num_documents, row.filter) for row in report.scores] == [
        ("mmlu", None, 5, 2, "none"), ("mmlu_stem", "mmlu", 5, 2, "none"), ("mmlu_anatomy", "mmlu_stem", 5, 2, "none"),
        ("gsm8k", None, 5, 1, "strict-match"), ("gsm8k", None, 5, 1, "flexible-extract"),
    ]  # fmt: skip
    assert report.is_partial_data and report.model.num_requests == 2 * 4 + 1


def test_prompts_on_local_files_are_the_official_ones(tmp_path: Path) -> None:
    opened = tasks.open_tasks((SuiteTask(task="mmlu_anatomy", num_fewshot=1),), data=mmlu(tmp_path))
    task = opened.tasks["mmlu_anatomy"]

    prompt = task.fewshot_context(task.eval_docs[1], num_fewshot=1)

    assert prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "What is 0, then?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\nWhat is 1, then?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_a_damaged_file_is_said_before_a_model_is_opened(tmp_path: Path) -> None:
    mmlu(tmp_path, header=None, rows=["q,a,b"])

    with pytest.raises(UsageError, match=r"anatomy_dev.csv, row 1: 4 columns"):
        score("reference", (SuiteTask(task="mmlu"),), options=ScoringOptions(data_dir=tmp_path, is_partial_data=True, cache_dir=tmp_path))


def test_more_shots_than_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'mmlu_anatomy' has 5 examples, fewer than the 6 shots"):
        tasks.open_tasks((SuiteTask(task="mmlu_anatomy", num_fewshot=6),), data=mmlu(tmp_path))


def test_a_task_asked_for_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'mmlu_anatomy' is asked for twice"):
        tasks.open_tasks((SuiteTask(task="mmlu"), SuiteTask(task="mmlu_anatomy")), data=mmlu(tmp_path))


def test_unknown_tasks_are_answered_with_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(lm_eval.__file__).parent / "tasks" / "arc"
    monkeypatch.setattr(tasks, "_whole_manager", lambda: TaskManager(include_defaults=False, include_path=str(folder)))

    with pytest.raises(UsageError, match=r"unknown task 'arc_eazy'; did you mean 'arc_easy'"):
        tasks.open_tasks((SuiteTask(task="arc_eazy"),))
    with pytest.raises(UsageError, match=r"unknown task 'reference_mmul'; did you mean 'reference_mmlu'"):
        tasks.open_tasks((SuiteTask(task="reference_mmul"),))


def test_a_task_whose_data_cannot_be_fetched_says_what_would_work() -> None:
    with pytest.raises(SourceError, match=r"the data of task 'gsm8k' cannot be fetched from the hub: .*--data-dir"):
        tasks.open_tasks((SuiteTask(task="gsm8k"),))


def test_the_quick_suite_needs_no_network_and_no_data() -> None:
    opened = tasks.open_tasks(Suite.load("quick").tasks)

    assert len(opened.tasks) == 13 and opened.documents == {"reference_gsm8k": range(100)}


def test_results_are_written_and_read_by_the_committed_schema(tmp_path: Path) -> None:
    asked = (SuiteTask(task="reference_gsm8k", num_fewshot=0, limit=1),)
    report = score("reference", asked, options=ScoringOptions(cache_dir=tmp_path), command="quantkit eval reference")
    committed = (packaged("evals") / "schemas" / "scores.json").read_text()

    report.write(tmp_path / "made" / "scores.json")

    content = json.loads((tmp_path / "made" / "scores.json").read_text())
    assert committed == ScoreReport.schema()
    jsonschema.validate(content, json.loads(committed))
    assert ScoreReport.read(tmp_path / "made" / "scores.json") == report
    assert content["schema_version"] == 1 and content["command"] == "quantkit eval reference" and content["versions"]["lm_eval"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema_version": 2}, "schema version 2, this quantkit reads 1"), ({"kind": "other"}, "is not a results file"), ({"x": 1}, "x: ")],
    ids=["version", "kind", "key"],
)
def test_other_results_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({"kind": "quantkit-scores", "schema_version": 1} | change))

    with pytest.raises(UsageError, match=message if "x" not in change else r"scores.json: \w+"):
        ScoreReport.read(tmp_path / "scores.json")


def test_a_group_that_is_a_mean_of_means_is_compared_so() -> None:
    from quantkit.evaluation.paired import TaskRun, _pairs

    samples = {
        "a": [{"doc_id": 0, "filter": "none", "acc": 1.0}],
        "b": [{"doc_id": n, "filter": "none", "acc": float(n == 0)} for n in range(3)],
    }
    run = TaskRun({"samples": samples, "group_subtasks": {}, "results": {"a": {"acc,none": 1.0}, "b": {"acc,none": 1 / 3}}})

    for is_weighted, mean in ((True, 2 / 4), (False, (1 + 1 / 3) / 2)):
        found = _pairs(run, run, ["a", "b"], ("acc", "none"), is_weighted)
        assert found is not None and sum(found[0]) / len(found[0]) == pytest.approx(mean)


def test_local_data_is_needed_for_partial_data() -> None:
    with pytest.raises(UsageError, match="--data-dir"):
        ScoringOptions(is_partial_data=True)
    with pytest.raises(UsageError, match="no data folder"):
        TaskData(Path("/none"))


def test_lm_eval_makes_the_model_from_its_arguments() -> None:
    from quantkit.evaluation.harness import HarnessLM, register

    register()
    register()

    assert lm_eval.api.registry.get_model("quantkit") is HarnessLM
    lm = HarnessLM.create_from_arg_string("pretrained=reference,mode=exact,max_length=64", {"batch_size": 1, "device": None})
    assert isinstance(lm.llm, LLM) and lm.max_length == 64 and lm.llm.engine.options.mode == "exact"
    with pytest.raises(UsageError, match="unknown model argument 'mod'; did you mean 'mode'"):
        HarnessLM.create_from_arg_string("pretrained=reference,mod=exact")
    with pytest.raises(UsageError, match="pretrained=FOLDER"):
        HarnessLM.create_from_arg_string("mode=exact")


def test_the_committed_run_of_the_official_tasks_is_whole() -> None:
    report = ScoreReport.read(packaged("evals") / "results" / "stories3m.json")

    wholes = {row.task: row for row in report.scores if row.group is None}
    assert (wholes["mmlu"].num_documents, wholes["gsm8k"].num_documents) == (14042, 1319)
    assert all(row.num_documents == row.num_available and row.comparison is not None for row in wholes.values())
    assert report.model.num_requests == 4 * 14042 + 1319 and not report.is_partial_data
