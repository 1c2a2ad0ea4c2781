"""Local files of GSM8K and MMLU: every published form reads the same, and what is wrong is named with its file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.evaluation.task_data import TaskData

HEADER = "question,choice0,choice1,choice2,choice3,answer"
ROWS = [f'"What is {n}, then?",{n},{n + 1},{n + 2},{n + 3}' for n in range(5)]
PROBLEM = {"question": "Two and two?", "answer": "2+2=4\n#### 4"}


def mmlu(folder: Path, *, letters: bool = False, header: str | None = HEADER, rows: list[str] = ROWS) -> TaskData:
    answers = "ABCDA" if letters else "01230"
    lines = [*([header] if header else []), *(f"{row},{answer}" for row, answer in zip(rows, answers, strict=False))]
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        (folder / "mmlu" / split / f"anatomy_{split}.csv").write_text("\n".join(lines) + "\n")
    return TaskData(folder, is_partial=True)


def gsm8k(folder: Path, lines: list[str]) -> TaskData:
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return TaskData(folder, is_partial=True)


@pytest.mark.parametrize("header", [HEADER, None, "Question,A,B,C,D,Answer"], ids=["header", "no header", "lettered header"])
@pytest.mark.parametrize("letters", [True, False], ids=["letters", "indices"])
def test_every_form_of_mmlus_files_reads_the_same(tmp_path: Path, header: str | None, letters: bool) -> None:
    rows = mmlu(tmp_path, letters=letters, header=header).mmlu("anatomy")

    assert len(rows["dev"]) == len(rows["test"]) == 5
    assert rows["test"][3] == {"subject": "anatomy", "question": "What is 3, then?", "choices": ["3", "4", "5", "6"], "answer": 3}


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    found = mmlu(tmp_path, header="answer,choice0,choice1,choice2,choice3,question", rows=["1,a,b,c,d"]).mmlu("anatomy")["test"]

    assert found == [{"subject": "anatomy", "question": "0", "choices": ["a", "b", "c", "d"], "answer": 1}]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("question,choice0,choice1,choice2,answer", ["q,a,b,c"], "anatomy_dev.csv, header: no column 'choice3'"),
        (None, ["q,a,b,c"], "anatomy_dev.csv, row 1: 5 columns; a question, four choices and the answer are 6"),
        (None, ["q,a,b,c,d", "q,a,b,c,d,e"], "anatomy_dev.csv, row 2: 7 columns"),
    ],
    ids=["header", "short row", "long row"],
)
def test_missing_columns_are_named_with_file_and_row(tmp_path: Path, header: str | None, rows: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mmlu(tmp_path, header=header, rows=rows).mmlu("anatomy")


def test_an_answer_that_is_no_choice_is_named(tmp_path: Path) -> None:
    data = mmlu(tmp_path)
    path = tmp_path / "mmlu" / "test" / "anatomy_test.csv"
    path.write_text(path.read_text().replace(",3\n", ",4\n"))

    with pytest.raises(UsageError, match=r"anatomy_test.csv, row 4: the answer is '4'; it is one of A to D, or 0 to 3"):
        data.mmlu("anatomy")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "test.jsonl, row 2: not JSON"),
        (json.dumps({"question": "q"}), "test.jsonl, row 2: no text in 'answer'"),
        (json.dumps({"question": "q", "answer": "four"}), "test.jsonl, row 2: the answer does not end in '#### NUMBER'"),
    ],
    ids=["not JSON", "no answer", "no number"],
)
def test_damaged_problems_are_named_with_file_and_row(tmp_path: Path, line: str, message: str) -> None:
    data = gsm8k(tmp_path, [json.dumps(PROBLEM)] * 2)
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(PROBLEM) + "\n" + line + "\n")

    with pytest.raises(UsageError, match=message):
        data.gsm8k()


def test_another_count_than_the_tasks_is_refused(tmp_path: Path) -> None:
    gsm8k(tmp_path, [json.dumps(PROBLEM)] * 2)
    mmlu(tmp_path, rows=ROWS * 2)

    with pytest.raises(UsageError, match=r"train.jsonl ends at row 2 of the 7473 that the task has; .*--partial-data"):
        TaskData(tmp_path).gsm8k()
    (tmp_path / "mmlu" / "dev" / "anatomy_dev.csv").write_text("q,a,b,c,d,A\n" * 6)
    for is_partial in (True, False):
        with pytest.raises(UsageError, match=r"anatomy_dev.csv goes on at row 6, after the 5 rows that the task has"):
            TaskData(tmp_path, is_partial=is_partial).mmlu("anatomy")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data folder"):
        TaskData(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no data file .*train.jsonl"):
        TaskData(tmp_path).gsm8k()


def test_the_real_files_are_whole(test_data: Path) -> None:
    data = TaskData(test_data / "data")

    assert {split: len(rows) for split, rows in data.gsm8k().items()} == {"train": 7473, "test": 1319}
    assert len(data.mmlu("professional_law")["test"]) == 1534
