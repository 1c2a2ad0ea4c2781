"""`quantkit report` from the command line: measured once, shown in every form, gone on with after a stop."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from quantkit.cli import main
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
from quantkit.paths import packaged
from quantkit.report import build
from quantkit.report.describe import bytes_per_token
from quantkit.report.layers import Heat, layer_grid
from quantkit.report.schema import Report
from tests.cli.test_generate import run
from tests.conversion.conftest import edit_tensors

FAST = ("--max-tokens", "600", "--seq-len", "64", "--requests", "1,2", "--threads", "1")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text("name: small\ntasks:\n  - task: reference_gsm8k\n    num_fewshot: 0\n    limit: 3\n")
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("made")
    for recipe in ("w4a16-rtn", "w8a16"):
        convert("reference", folder / recipe, ConvertOptions(recipe=recipe, measure=False))
    return [folder / "w4a16-rtn", folder / "w8a16"]


@pytest.fixture(scope="module")
def report(checkpoints: list[Path], suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, checkpoints), "--baseline", "reference", "-o", str(folder), "--suite", str(suite), *FAST])
    assert not ended.value.code
    return folder


def test_every_part_is_measured_and_the_file_is_of_its_schema(report: Path, checkpoints: list[Path]) -> None:
    found = Report.read(report / "report.json")
    committed = (packaged("evals") / "schemas" / "report.json").read_text()

    assert committed == Report.schema()
    jsonschema.validate(json.loads((report / "report.json").read_text()), json.loads(committed))
    assert [each.name for each in found.checkpoints] == ["w4a16-rtn", "w8a16"]
    for each in found.checkpoints:
        assert each.text and each.tasks and each.speed and each.conversion and each.text.continuations
        assert [load.num_requests for load in each.speed.loads] == [1, 2]
        assert all(0 < load.ratio_low <= load.ratio <= load.ratio_high for load in each.speed.loads)
        assert each.text.made.command.startswith("quantkit report ") and each.speed.made.machine.threads == 1
    again = evaluate(checkpoints[0], baseline="reference", options=EvaluationOptions(max_tokens=600, seq_len=64))
    assert found.checkpoints[0].text is not None and found.checkpoints[0].text.result == again.divergence
    speeds = [each.speed for each in found.checkpoints if each.speed is not None]
    assert len({speed.bandwidth for speed in speeds}) == 1 and all(load.baseline_rate > 0 for speed in speeds for load in speed.loads)


def test_the_page_is_whole_and_loads_nothing(report: Path) -> None:
    html = (report / "report.html").read_text()

    class Watcher(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.loaded: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value and not value.startswith("#")]

    watcher = Watcher()
    watcher.feed(html)
    assert not watcher.loaded and "http-equiv" not in html and "<script" not in html and "@import" not in html
    assert html.count("<svg") == html.count("</svg>") == 8
    titles = ("Size against KL divergence", "KL divergence by position", "Output under load", "Recovery by task")
    for title in (*titles, "Error by depth", "Errors layer by layer"):
        assert title in html
    assert not re.search(r"#0[0-9a-f]{5}\b", html.split("</style>")[1]), "a color that is not the page's"
    assert "w4a16-rtn" in html and "quantkit report" in html


def test_markdown_and_stdout_have_a_row_for_each(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (report / "report.md").read_text()
    tables = [line for line in text.split("\n") if line.startswith("| w4a16-rtn")]

    assert len(tables) >= 5 and all(line.count("|") > 5 for line in tables)
    code, out, _ = run(capsys, "report", str(report / "report.json"), "--measure", "none", "-o", str(report / "again"))
    assert code == 0 and "w8a16" in out and "compressed-tensors" in out


def test_what_is_known_is_not_measured_again(
    report: Path, checkpoints: list[Path], suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Report.read(report / "report.json")
    for name in ("measure_text", "measure_tasks", "measure_speed"):
        monkeypatch.setattr(build, name, lambda *args, **kwargs: pytest.fail("measured again"))

    code, _, _ = run(capsys, "report", *map(str, checkpoints), "--baseline", "reference", "-o", str(report), "--suite", str(suite), *FAST)

    assert code == 0 and Report.read(report / "report.json").checkpoints == before.checkpoints


def test_what_was_found_in_another_way_is_measured_again(
    report: Path, checkpoints: list[Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text, other tokens, another suite under the same name, other numbers of requests, other weights under the same name."""
    asked: list[str] = []
    for kind in ("text", "tasks", "speed"):
        monkeypatch.setattr(build, f"measure_{kind}", lambda *_, kind=kind, **__: asked.append(kind) or (_ for _ in ()).throw(KeyboardInterrupt))
    text = tmp_path / "other.txt"
    text.write_text("Once upon a time. " * 100)
    other = tmp_path / "small.yaml"
    other.write_text(suite.read_text().replace("limit: 3", "limit: 4"))
    near = tmp_path / checkpoints[0].name
    shutil.copytree(checkpoints[0], near)
    edit_tensors(near, lambda tensors: tensors["model.layers.3.self_attn.q_proj.weight_packed"].zero_())
    base = ["--baseline", "reference", "--suite", str(suite), *FAST]
    changes = {
        "text": [str(checkpoints[0]), *base, "--text", str(text)], "tokens": [str(checkpoints[0]), *base, "--max-tokens", "500"],
        "tasks": [str(checkpoints[0]), *base, "--suite", str(other), "--measure", "tasks"],
        "speed": [str(checkpoints[0]), *base, "--requests", "1,3", "--measure", "speed"], "weights": [str(near), *base],
        "nothing": [str(checkpoints[0]), *base],
    }  # fmt: skip
    for what, arguments in changes.items():
        folder = tmp_path / what
        folder.mkdir()
        shutil.copy(report / "report.json", folder) if what != "weights" else None
        known = [str(report / "report.json")] if what == "weights" else []
        asked.clear()
        code, _, err = run(capsys, "report", *arguments, *known, "-o", str(folder))
        if what == "weights":
            assert code == 2 and "two checkpoints go by the name" in err
        else:
            assert asked == ([] if what == "nothing" else ["text" if what == "tokens" else what])


def test_reports_of_two_machines_come_together_kind_by_kind(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Report.read(report / "report.json")
    parts = {"laptop": {"text": None}, "server": {"speed": None, "tasks": None}}
    for name, gone in parts.items():
        each = [checkpoint.model_copy(update=gone) for checkpoint in whole.checkpoints]
        whole.model_copy(update={"checkpoints": each}).write(tmp_path / f"{name}.json")

    code, _, _ = run(capsys, "report", *(str(tmp_path / f"{name}.json") for name in parts), "--measure", "none", "-o", str(tmp_path / "both"))

    assert code == 0 and Report.read(tmp_path / "both" / "report.json").checkpoints == whole.checkpoints


def test_reports_beside_another_original_are_refused(
    report: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "report", str(report / "report.json"), "--baseline", str(checkpoints[1]), "-o", str(tmp_path / "x"))
    assert code == 2 and "beside" in err

    shutil.copy(report / "report.json", tmp_path)
    code, _, err = run(capsys, "report", str(checkpoints[0]), "--baseline", str(checkpoints[1]), "-o", str(tmp_path))
    assert code == 2 and "--output" in err and Report.read(tmp_path / "report.json") == Report.read(report / "report.json")


def test_what_cannot_end_well_is_said_before_anything_is_measured(
    checkpoints: list[Path], peers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("text", "tasks", "speed"):
        monkeypatch.setattr(build, f"measure_{kind}", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    undecoded = Path(shutil.copytree(peers / "awq_gemm_autoawq", tmp_path / "undecoded"))
    (undecoded / "config.json").write_text((undecoded / "config.json").read_text().replace('"awq"', '"quark"'))

    arguments = ("--baseline", "reference", *FAST)
    assert "cannot be written" in run(capsys, "report", str(checkpoints[0]), *arguments, "-o", str(tmp_path / "file" / "x"))[2]
    assert "not read yet" in run(capsys, "report", str(checkpoints[0]), str(undecoded), *arguments, "-o", str(tmp_path / "y"))[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "quantkit[report]" in run(capsys, "report", str(checkpoints[0]), *arguments, "-o", str(tmp_path / "z"))[2]


def test_a_stopped_report_keeps_what_it_found(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "measure_speed", stop)
    arguments = ("report", str(checkpoints[1]), "--baseline", "reference", "-o", str(tmp_path), "--measure", "text,speed", *FAST)
    code, _, _ = run(capsys, *arguments)
    kept = Report.read(tmp_path / "report.json").checkpoints[0]

    assert code == 130 and kept.text is not None and kept.speed is None


def test_a_check_fails_where_a_figure_is_worse(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    one = {"name": "rtn", "recipe": "w4a16-rtn", "format": "gptq"}
    content = {"kind": "quantkit-check", "schema_version": 1, "source": "reference", "suite": str(suite), "checkpoints": [one]}
    file.write_text(json.dumps(content | {"max_tokens": 600, "seq_len": 64}))
    arguments = ("report", "--check", str(file), "-o", str(tmp_path / "out"), "--measure", "text")

    code, _, err = run(capsys, *arguments)
    assert code == 2 and "has no figures" in err and not (tmp_path / "out").exists()
    code, _, err = run(capsys, *arguments, "--update", "--max-tokens", "500")
    assert code == 2 and "--max-tokens is said by the file" in err
    code, _, err = run(capsys, *arguments, "--update")
    assert code == 0 and "has these figures now" in err
    assert run(capsys, *arguments)[0] == 0

    content = json.loads(file.read_text())
    content["checkpoints"][0]["kl"]["value"] /= 2
    file.write_text(json.dumps(content))
    code, out, _ = run(capsys, *arguments)
    assert code == 1 and "1 of 2 figures are worse than they may be." in out
    assert "failure" in (tmp_path / "out" / "report.xml").read_text()


def test_a_check_measures_of_each_checkpoint_what_its_file_says(suite: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    one = {"name": "rtn", "recipe": "w4a16-rtn", "format": "gptq", "measured": ["text"]}
    content = {"kind": "quantkit-check", "schema_version": 1, "source": "reference", "suite": str(suite), "checkpoints": [one]}
    file.write_text(json.dumps(content | {"max_tokens": 600, "seq_len": 64}))

    with pytest.raises(SystemExit):
        main(["report", "--check", str(file), "-o", str(tmp_path / "out"), "--update"])

    (found,) = Report.read(tmp_path / "out" / "report.json").checkpoints
    (kept,) = json.loads(file.read_text())["checkpoints"]
    assert found.text is not None and found.tasks is None and found.speed is None
    assert kept["kl"] and kept["measured"] == ["text"] and not kept["recovery"] and not kept["speed"]


def test_scores_of_an_evaluation_are_taken_in(checkpoints: list[Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.json"
    evaluation = ("eval", str(checkpoints[0]), "--baseline", "reference", "--suite", str(suite), "--output", str(scores), "--threads", "1")
    assert run(capsys, *evaluation)[0] == 0

    code, _, _ = run(capsys, "report", str(scores), "--measure", "none", "-o", str(tmp_path / "out"))

    (found,) = Report.read(tmp_path / "out" / "report.json").checkpoints
    assert code == 0 and found.name == "w4a16-rtn" and found.tasks is not None
    assert [each.model_dump() for each in found.tasks.scores] == json.loads(scores.read_text())["scores"]
    content = json.loads(scores.read_text())
    content["model"]["fingerprint"] = "0" * 64
    scores.write_text(json.dumps(content))
    code, _, err = run(capsys, "report", str(scores), "--measure", "none", "-o", str(tmp_path / "other"))
    assert code == 2 and "other weights" in err


def test_a_check_answers_anew_what_an_earlier_one_answered(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "check.json"
    one = {"name": "rtn", "recipe": "w4a16-rtn", "format": "gptq"}
    file.write_text(json.dumps({"kind": "quantkit-check", "schema_version": 1, "source": "reference", "suite": str(suite), "checkpoints": [one]}))
    arguments = ("report", "--check", str(file), "-o", str(tmp_path / "out"), "--measure", "tasks")
    assert run(capsys, *arguments, "--update")[0] == 0

    monkeypatch.setattr("quantkit.evaluation.scoring.EngineLM", lambda *_: pytest.fail("a runtime that fails"))

    with pytest.raises(pytest.fail.Exception, match="a runtime that fails"):
        main(list(arguments))


MISTAKES = {
    "no baseline": (("report", "reference"), "--baseline"),
    "no checkpoint": (("report", "--baseline", "reference"), "no checkpoint"),
    "unknown measurement": (("report", "reference", "--measure", "sped"), "did you mean 'speed'"),
    "bad requests": (("report", "reference", "--requests", "1,x"), "1,x"),
    "update without a file": (("report", "reference", "--update"), "--check"),
    "absent checkpoint": (("report", "/no/such", "--baseline", "reference"), "/no/such"),
    "absent report": (("report", "no.json", "--measure", "none"), "no.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[mistake]

    code, _, err = run(capsys, *arguments, "-o", str(tmp_path / "out"))

    assert code in (1, 2) and words in err and not (tmp_path / "out").exists()


def test_models_of_another_vocabulary_are_refused_by_name(test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = test_data / "data" / "stories260k-hf"

    code, _, err = run(capsys, "report", str(other), "--baseline", "reference", "-o", str(tmp_path), "--measure", "text")

    assert code == 1 and "cannot be compared" in err


def test_figures_that_cannot_be_compared_are_said(report: Path) -> None:
    from quantkit.report.markdown import markdown
    from quantkit.report.page import page

    whole = Report.read(report / "report.json")
    first, second = whole.checkpoints
    assert second.text is not None and not any("cannot be compared" in text for text in (markdown(whole), page(whole)))
    other = second.model_copy(update={"text": second.text.model_copy(update={"measured_on": "another text"})})
    mixed = whole.model_copy(update={"checkpoints": [first, other]})

    for text in (markdown(mixed), page(mixed)):
        assert "KL divergences and perplexities below are of different texts" in text and "another text" in text


def test_a_token_reads_every_weight_but_the_other_rows_of_an_embedding(test_data: Path, checkpoints: list[Path]) -> None:
    from quantkit.formats.summary import summarize

    tied = summarize(checkpoints[0])
    assert tied.is_tied and bytes_per_token(str(checkpoints[0])) == sum(part.num_bytes for part in (*tied.layers, *tied.unquantized))


def test_layers_stand_in_a_map_by_block_and_kind(report: Path) -> None:
    checkpoint = Report.read(report / "report.json").checkpoints[0]
    found = layer_grid(checkpoint)

    assert found is not None and found.kinds == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert found.blocks == [str(number) for number in range(6)]
    heats = [Heat.of([found])(layer.error) for layer in found.layers.values()]
    assert (min(heats), max(heats), len(heats)) == (0.0, 1.0, 42)
    account = json.loads((Path(checkpoint.source) / "quantkit_report.json").read_text())["layers"]
    assert [(each["name"], each["error"]) for each in account] == [(layer.name, layer.error) for layer in checkpoint.conversion.layers]
