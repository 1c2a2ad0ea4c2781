"""The reference model's held-out items as lm-eval's data sets; lm-eval calls these by the YAML files beside this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

SPLITS = Path(__file__).resolve().parents[1] / "reference" / "splits"


def questions(*, subject: str, **_: Any) -> DatasetDict:
    return DatasetDict(test=_rows("questions", subject), dev=_rows("questions_fewshot", subject))


def word_problems(**_: Any) -> DatasetDict:
    return DatasetDict(test=_rows("word_problems"), train=_rows("word_problems_fewshot"))


def _rows(name: str, subject: str | None = None) -> Dataset:
    rows = [json.loads(line) for line in (SPLITS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([row for row in rows if subject is None or row["subject"] == subject])
