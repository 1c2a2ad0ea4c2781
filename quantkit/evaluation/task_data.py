"""GSM8K and MMLU from local files, checked row by row and counted before any model is opened.

Laid out as their authors publish them: `gsm8k/{train,test}.jsonl` and `mmlu/{dev,test}/SUBJECT_{dev,test}.csv`. CSVs come with and without a header,
their answers as letters or as indices from 0.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.paths import packaged

_ANSWERS = {**{letter: index for index, letter in enumerate("ABCD")}, **{str(index): index for index in range(4)}}
_RESULT = re.compile(r"#### -?[$0-9]")
_CHOICES = (("choice0", "choice1", "choice2", "choice3"), ("choice1", "choice2", "choice3", "choice4"), ("a", "b", "c", "d"))


@dataclass(frozen=True, slots=True)
class TaskData:
    """A folder of local files.

    Attributes:
        is_partial: files may hold fewer rows than the task has, and subjects may be missing.
    """

    folder: Path
    is_partial: bool = False

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UsageError(f"there is no data folder {self.folder}")

    def gsm8k(self) -> dict[str, list[dict[str, Any]]]:
        """The splits `train` and `test`.

        Raises:
            UsageError: a file is missing, damaged or of another length than the task's; names it and the line.
        """
        counts = _counts()["gsm8k"]
        return {split: self._read(self._place("gsm8k") / f"{split}.jsonl", _gsm8k_rows, counts[split]) for split in ("train", "test")}

    def mmlu(self, subject: str) -> dict[str, list[dict[str, Any]]]:
        """The splits `dev` and `test` of a subject.

        Raises:
            UsageError: as gsm8k does.
        """
        counts = _counts()["mmlu"]
        expected = {"dev": counts["dev"], "test": counts["test"][subject]}

        def rows(path: Path) -> Iterator[dict[str, Any]]:
            return ({"subject": subject, **row} for row in _mmlu_rows(path))

        return {split: self._read(self._mmlu_file(subject, split), rows, count) for split, count in expected.items()}

    def has_mmlu(self, subject: str) -> bool:
        return self._mmlu_file(subject, "test").is_file()

    def _mmlu_file(self, subject: str, split: str) -> Path:
        return self._place("mmlu") / split / f"{subject}_{split}.csv"

    def _place(self, name: str) -> Path:
        """The data set's own folder, which the user may also have given itself."""
        return self.folder / name if (self.folder / name).is_dir() else self.folder

    def _read(self, path: Path, parse: Callable[[Path], Iterator[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
        if not path.is_file():
            raise UsageError(f"no data file {path}; the folder of --data-dir holds gsm8k/test.jsonl, mmlu/test/anatomy_test.csv and so on")
        try:
            rows = list(parse(path))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from error
        if self.is_partial and 0 < len(rows) <= count:
            return rows
        if len(rows) != count:
            raise UsageError(
                f"{path} ends at row {len(rows)} of the {count} that the task has; take the whole file, or --partial-data for scores of a part"
                if len(rows) < count
                else f"{path} goes on at row {count + 1}, after the {count} rows that the task has; take the file of the right split"
            )
        return rows


def _counts() -> dict[str, Any]:
    return json.loads((packaged("evals") / "tasks" / "counts.json").read_text(encoding="utf-8"))


def _gsm8k_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, row {number}: not JSON: {error}") from error
            missing = [name for name in ("question", "answer") if not isinstance(row, dict) or not isinstance(row.get(name), str)]
            if missing:
                raise UsageError(f"{path}, row {number}: no text in {' and '.join(repr(name) for name in missing)}")
            if not _RESULT.search(row["answer"]):
                raise UsageError(f"{path}, row {number}: the answer does not end in '#### NUMBER'")
            yield {name: row[name] for name in ("question", "answer")}


def _mmlu_rows(path: Path) -> Iterator[dict[str, Any]]:
    columns: list[int] | None = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        for fields in csv.reader(file):
            if not fields:
                continue
            if columns is None:
                columns = _header(path, fields)
                if columns is not None:
                    continue
                columns = list(range(6))
            number += 1
            if len(fields) != max(6, max(columns) + 1):
                raise UsageError(f"{path}, row {number}: {len(fields)} columns; a question, four choices and the answer are 6")
            question, *choices, answer = (fields[column] for column in columns)
            if answer.strip() not in _ANSWERS:
                raise UsageError(f"{path}, row {number}: the answer is {answer!r}; it is one of A to D, or 0 to 3")
            yield {"question": question, "choices": choices, "answer": _ANSWERS[answer.strip()]}


def _header(path: Path, fields: list[str]) -> list[int] | None:
    """Where question, choices and answer stand, by the first row's names; None if it holds no names."""
    names = [field.strip().lower() for field in fields]
    if "question" not in names and "answer" not in names:
        return None
    choices = next((each for each in _CHOICES if set(each) <= set(names)), _CHOICES[0])
    wanted = ["question", *choices, "answer"]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UsageError(f"{path}, header: no column {', '.join(repr(name) for name in missing)}; there are {', '.join(names)}")
    return [names.index(name) for name in wanted]
