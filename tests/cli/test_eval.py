"""`quantkit eval --tasks` and `quantkit lm-eval` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from quantkit.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")


def ending(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_scores_are_shown_written_and_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "reference", "--tasks", "reference_gsm8k", "--limit", "2", "--num-fewshot", "1", "--cache-dir", str(tmp_path)]

    assert ending(*words) == 0
    assert "reference_gsm8k" in capsys.readouterr().out
    assert ending(*words, "--baseline", "reference", "--json", "--output", str(tmp_path / "scores.json")) == 0

    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report == json.loads((tmp_path / "scores.json").read_text())
    assert report["baseline"]["num_known"] == report["model"]["num_requests"] == 2
    assert report["scores"][0]["comparison"]["num_documents"] == 2


def test_a_comparison_is_a_table_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\ntasks: [{task: reference_mmlu, limit: 1}]\n")

    assert ending("eval", "reference", "--baseline", "reference", "--suite", str(suite), "--context", "32", "--cache-dir", str(tmp_path)) == 0

    shown = capsys.readouterr()
    assert "no loss detectable above" in shown.out and "recovery" in shown.out
    assert "were longer than the context and lost their beginning" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "3"], "--limit is about tasks; name them with --tasks or --suite"),
        (["--tasks", "mmlu", "--metrics", "ppl"], "--metrics measures text"),
        (["--tasks", "mmlu", "--suite", "quick"], "--tasks or --suite, not both"),
        (["--tasks", ","], "--tasks names no task"),
        (["--suite", "quik"], "did you mean 'quick'"),
        (["--tasks", "mmlu", "--partial-data"], "--data-dir"),
    ],
    ids=["a task's option", "a metric's option", "both", "no name", "near suite", "partial"],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("eval", "reference", *words) == 2

    assert message in capsys.readouterr().err


def test_lm_evals_own_command_line_runs_on_our_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    from quantkit.paths import packaged

    true = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **settings: true(**settings | {"include_defaults": False}))  # 20 s of indexing

    words = ["--model_args", "pretrained=reference,mode=fast", "--tasks", "reference_gsm8k", "--limit", "1"]
    assert ending("lm-eval", "run", *words, "--include_path", str(packaged("evals") / "tasks"), "--output_path", str(tmp_path)) == 0

    found = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert found["config"]["model"] == "quantkit" and found["results"]["reference_gsm8k"]["exact_match,strict-match"] == 1.0
