"""`quantkit report` from the command line: measured once, shown in every form, gone on with after a stop."""

from __future__ import annotations

import json
import re
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
from quantkit.report.page import heat_map
from quantkit.report.schema import Report

FAST = ("--max-tokens", "600", "--seq-len", "64", "--requests", "1,2", "--threads", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


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
    assert found.baseline.speed is not None and {load.ratio for load in found.baseline.speed.loads} == {1.0}


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
    assert html.count("<svg") == html.count("</svg>") == 5
    for title in ("Size against KL divergence", "KL divergence by position", "Output under load", "Recovery by task", "Errors layer by layer"):
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
    file.write_text(json.dumps({"kind": "quantkit-check", "schema_version": 1, "source": "reference", "suite": str(suite), "checkpoints": [one]}))
    arguments = ("report", "--check", str(file), "-o", str(tmp_path / "out"), "--measure", "text", "--max-tokens", "600", "--seq-len", "64")

    code, _, err = run(capsys, *arguments, "--update")
    assert code == 0 and "has these figures now" in err
    assert run(capsys, *arguments)[0] == 0

    content = json.loads(file.read_text())
    content["checkpoints"][0]["kl"]["value"] /= 2
    file.write_text(json.dumps(content))
    code, out, _ = run(capsys, *arguments)
    assert code == 1 and "1 of 2 figures are worse than they may be." in out
    assert "failure" in (tmp_path / "out" / "report.xml").read_text()


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


def test_a_token_reads_every_weight_but_the_other_rows_of_an_embedding(test_data: Path, checkpoints: list[Path]) -> None:
    from quantkit.formats.summary import summarize

    tied = summarize(checkpoints[0])
    assert tied.is_tied and bytes_per_token(str(checkpoints[0])) == sum(part.num_bytes for part in (*tied.layers, *tied.unquantized))


def test_layers_stand_in_a_map_by_block_and_kind(report: Path) -> None:
    found = heat_map(Report.read(report / "report.json").checkpoints[0])

    assert found is not None and found.columns == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [block for block, _ in found.rows] == [str(number) for number in range(6)]
    heats = [cell[1] for _, row in found.rows for cell in row if cell is not None]
    assert (min(heats), max(heats), len(heats)) == (0.0, 1.0, 42)
