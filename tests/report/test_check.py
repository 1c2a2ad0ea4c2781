"""A regression fails and nothing else does: figures against what was committed, their limits and their noise."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from quantkit.bench.speed import Load, Speed, ratios
from quantkit.core.divergence import DivergenceResult
from quantkit.errors import UsageError
from quantkit.evaluation import results
from quantkit.evaluation.results import Comparison, Score, Settings, TaskScore
from quantkit.evaluation.significance import compare_scores
from quantkit.formats.registry import CONTAINERS
from quantkit.paths import packaged
from quantkit.report import words
from quantkit.report.charts import _front
from quantkit.report.check import CheckFile, ExpectedCheckpoint, Finding, Kept, Limits, check, updated
from quantkit.report.junit import junit
from quantkit.report.markdown import markdown
from quantkit.report.measure import provenance
from quantkit.report.page import page
from quantkit.report.schema import CheckpointResult, LoadPoint, Report, SpeedResult, TaskResult, TextResult

MADE = provenance("quantkit report")
SETTINGS = Settings(mode="fast", device="cpu", context=None, quantization=None, kv_cache_dtype="auto", chat_template=False)


def text_result(kl: float, error: float) -> TextResult:
    fields = {name: 0.0 for name in DivergenceResult.__dataclass_fields__ if name not in ("num_tokens", "by_position")}
    percentiles = {name: kl for name in ("median", "99.0%", "99.9%", "maximum")}
    tables: dict[str, Any] = {"kl_percentiles": percentiles, "delta_p_percentiles": {}, "num_tokens": 1000}
    return TextResult(made=MADE, key="", measured_on="prose", seq_len=512, continuations=None,
                      result=DivergenceResult(**fields | tables | {"kl_mean": kl, "kl_se": error}))  # fmt: skip


def task_result(lost: int, won: int, count: int = 1000) -> TaskResult:
    baseline, model = np.ones(count), np.ones(count)
    model[:lost] = 0
    baseline[lost : lost + won] = 0
    found = Comparison(**compare_scores(baseline, model).to_dict())
    score = TaskScore(
        task="quiz", group=None, is_group=False, metric="acc", filter="none", higher_is_better=True, num_fewshot=0, version="1", num_documents=count,
        num_available=count, score=Score(value=float(model.mean()), standard_error=0.0), baseline=None, comparison=found,
    )  # fmt: skip
    return TaskResult(made=MADE, key="", suite="quick", settings=SETTINGS, is_partial_data=False, scores=[score])


def speed_result(ratio: float, low: float, high: float) -> SpeedResult:
    times = {"output_rate": 100.0, "baseline_rate": 50.0, "first_token_ms": 5.0, "inter_token_ms": 1.0}
    load = LoadPoint(num_requests=8, ratio=ratio, ratio_low=low, ratio_high=high, **times)
    sizes = {"num_prompt": 128, "num_output": 32, "turns": 3, "bytes_per_token": 10}
    return SpeedResult(made=MADE, key="", mode="fast", prompt_rate=1000.0, loads=[load], bandwidth=1e9, **sizes)


def report_of(**parts: Any) -> Report:
    common = {"source": "x", "fingerprint": "0", "container": "gptq", "schemes": {"w4a16": 2}, "bits_per_weight": 4.1}
    base = CheckpointResult(name="base", file_bytes=1000, **common)
    own = CheckpointResult(**{"name": "small", "file_bytes": 400} | common | parts)
    return Report(date=results.now(), command="quantkit report", versions=results.versions(), baseline=base, checkpoints=[own])


def expected_of(**figures: Any) -> CheckFile:
    return CheckFile(source="base", made=MADE, checkpoints=[ExpectedCheckpoint(name="small", recipe="w4a16-rtn", format="gptq", **figures)])


def only(report: Report, expected: CheckFile) -> Finding:
    (finding,) = check(report, expected)
    return finding


@pytest.mark.parametrize(
    ("kl", "error", "wanted"),
    [(0.02, 1e-4, "same"), (0.0205, 1e-4, "within limit"), (0.0301, 1e-4, "worse"), (0.0301, 0.01, "within noise"), (0.0101, 1e-4, "better")],
)
def test_kl_fails_beyond_its_limit_and_beyond_noise(kl: float, error: float, wanted: str) -> None:
    found = only(report_of(text=text_result(kl, error)), expected_of(kl=Kept(value=0.02, error=1e-4)))

    assert found.verdict == wanted and found.has_failed == (wanted == "worse")
    assert found.allowed == pytest.approx(0.022) and found.noise == pytest.approx(2 * (error**2 + 1e-8) ** 0.5)


@pytest.mark.parametrize(("lost", "won", "wanted"), [(0, 0, "same"), (15, 0, "within limit"), (80, 0, "worse"), (30, 28, "within noise")])
def test_a_recovery_fails_beyond_its_interval(lost: int, won: int, wanted: str) -> None:
    found = only(report_of(tasks=task_result(lost, won)), expected_of(recovery={"quiz acc": 1.0}))

    assert found.verdict == wanted and found.has_failed == (wanted == "worse")


@pytest.mark.parametrize(("num_bytes", "wanted"), [(400, "same"), (403, "within limit"), (405, "worse"), (390, "better")])
def test_bytes_know_no_noise(num_bytes: int, wanted: str) -> None:
    assert only(report_of(file_bytes=num_bytes), expected_of(file_bytes=400)).verdict == wanted


@pytest.mark.parametrize(
    ("speed", "wanted"),
    [((1.5, 1.4, 1.6), "same"), ((0.9, 0.8, 0.95), "within limit"), ((0.7, 0.6, 0.8), "worse"), ((0.7, 0.5, 1.6), "within noise")],
)
def test_a_speed_ratio_fails_where_no_turn_came_near(speed: tuple[float, float, float], wanted: str) -> None:
    assert only(report_of(speed=speed_result(*speed)), expected_of(speed={8: 1.5})).verdict == wanted


def test_another_processor_is_held_to_less() -> None:
    machine = MADE.machine.model_copy(update={"processor": "another"})
    elsewhere = expected_of(speed={8: 1.5}).model_copy(update={"made": MADE.model_copy(update={"machine": machine})})

    assert only(report_of(speed=speed_result(0.4, 0.4, 0.4)), expected_of(speed={8: 1.5})).has_failed
    assert only(report_of(speed=speed_result(0.4, 0.4, 0.4)), elsewhere).verdict == "within limit"
    assert only(report_of(speed=speed_result(0.2, 0.2, 0.2)), elsewhere).has_failed


def test_what_was_not_measured_fails() -> None:
    expected = expected_of(kl=Kept(value=0.02), recovery={"quiz acc": 1.0, "gone acc": 0.5}, speed={8: 1.0, 16: 1.0}, file_bytes=400)
    report = report_of(tasks=task_result(0, 0), speed=speed_result(1, 1, 1))

    found = check(report, expected)

    assert [each.figure for each in found if each.verdict == "missing"] == ["KL divergence", "recovery, gone acc", "speed ratio, 16 at once"]
    assert all(each.has_failed for each in check(report.model_copy(update={"checkpoints": []}), expected))


def test_an_updated_file_has_the_reports_figures() -> None:
    report = report_of(text=text_result(0.03, 1e-4), tasks=task_result(10, 0), speed=speed_result(1.2345, 1, 2))
    file = updated(expected_of(), report, MADE)

    (kept,) = file.checkpoints
    assert (kept.file_bytes, kept.kl, kept.speed) == (400, Kept(value=0.03, error=1e-4), {8: 1.234})
    assert kept.recovery == {"quiz acc": pytest.approx(0.99)}
    assert {each.verdict for each in check(report, file)} <= {"same", "within noise"}


def test_every_form_says_what_failed(tmp_path: Path) -> None:
    report = report_of(text=text_result(0.05, 1e-4), tasks=task_result(80, 0), speed=speed_result(1, 1, 1))
    findings = check(report, expected_of(kl=Kept(value=0.02, error=1e-4), recovery={"quiz acc": 1.0}, speed={8: 1.0}))
    said = "2 of 3 figures are worse than they may be"

    assert said in words.verdict(findings) and said in markdown(report, findings) and said in page(report, findings)
    suites = ElementTree.fromstring(junit(findings))
    assert (suites.get("tests"), suites.get("failures")) == ("3", "2")
    failed = [case.get("name") for case in suites.iter("testcase") if case.find("failure") is not None]
    assert failed == ["KL divergence", "recovery, quiz acc"]
    assert "| small | KL divergence | 0.02 | 0.05 | +150.0% |" in markdown(report, findings)


def test_what_is_not_a_number_fails() -> None:
    assert only(report_of(text=text_result(float("nan"), 0.0)), expected_of(kl=Kept(value=0.02))).has_failed


def test_names_break_out_of_no_form() -> None:
    odd = "a|b`<script>alert(1)</script>[x](y)\x01$x$"
    report = report_of(name=odd, text=text_result(0.05, 1e-4))
    expected = CheckFile.model_construct(checkpoints=[ExpectedCheckpoint.model_construct(
        name=odd, recipe="", format="", file_bytes=None, kl=Kept(value=0.02), recovery={}, speed={})], limits=Limits(), made=MADE)  # fmt: skip
    findings = check(report, expected)

    assert "<script>" not in markdown(report, findings) and "<script>alert" not in page(report, findings)
    assert ElementTree.fromstring(junit(findings)).get("failures") == "1"
    rows = [line for line in markdown(report, findings).splitlines() if "alert" in line and line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", line)) in (9, 10) for line in rows)


def test_the_front_has_what_no_other_beats() -> None:
    assert _front([(4, 0.1), (3, 0.5), (5, 0.2), (6, 0.01), (4, 0.3)]) == [(3, 0.5), (4, 0.1), (6, 0.01)]


def test_a_ratio_is_the_median_of_turns_beside_each_other() -> None:
    def speed(*rates: float) -> Speed:
        return Speed((1.0,) * len(rates), {4: tuple(Load(4, rate, 1.0, 1.0) for rate in rates)})

    model, base = speed(100, 50, 30), speed(50, 50, 10)
    assert ratios(model, base, 4) == (2.0, 1.0, 3.0)
    assert model.median(4).output_rate == 50 and base.median(4).output_rate == 50


def test_tables_have_their_figures_in_their_columns() -> None:
    result = text_result(0.02, 1e-4)
    result = result.model_copy(update={"result": replace(result.result, kl_percentiles={"median": 1.0, "99.0%": 2.0, "99.9%": 3.0, "maximum": 4.0})})
    heads, ((*row,),) = words.tails(report_of(text=result))
    assert dict(zip(heads, row, strict=True))["99.9% KL"] == "3.0000" and row[2:6] == ["1.0000", "2.0000", "3.0000", "4.0000"]
    heads, ((*row,),) = words.speeds(report_of(speed=speed_result(2.0, 1.5, 2.5)))
    assert dict(zip(heads, row, strict=True))["the original beside it"] == "50.0"
    assert speed_result(1, 1, 1).limit == 1e9 / 10


def test_at_no_true_difference_a_recovery_fails_as_seldom_as_it_says() -> None:
    """Two equally good models: both right on 90% of the documents, independently."""
    dice = np.random.default_rng(0)
    failures = 0
    for _ in range(200):
        sides = dice.random((2, 300)) < 0.9
        found = Comparison(**compare_scores(sides[0].astype(float), sides[1].astype(float)).to_dict())
        tasks = task_result(0, 0)
        report = report_of(tasks=tasks.model_copy(update={"scores": [tasks.scores[0].model_copy(update={"comparison": found})]}))
        failures += only(report, expected_of(recovery={"quiz acc": 1.0})).has_failed
    assert failures <= 0.05 * 200


def test_the_committed_file_is_whole() -> None:
    file = CheckFile.read(packaged("evals") / "baselines" / "reference.json")

    assert file.made is not None
    assert {each.format for each in file.checkpoints} == set(CONTAINERS)
    for each in file.checkpoints:
        assert each.file_bytes and each.kl and "text" in each.measured
        assert bool(each.recovery) == ("tasks" in each.measured) and bool(each.speed) == ("speed" in each.measured)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    report_of().write(tmp_path / "report.json")

    with pytest.raises(UsageError, match="is not a file of `quantkit report --check`"):
        CheckFile.read(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json").checkpoints[0].name == "small"
