"""Windows of text, and rows of tokens made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import SourceError, UsageError
from quantkit.evaluation.rows import default_text, rows_of_text, rows_of_tokens
from quantkit.models.tokenizer import load_tokenizer, text_prefix


@pytest.fixture(scope="module")
def tokenizer(test_data: Path) -> object:
    return load_tokenizer(test_data / "data" / "stories260k-hf")


def text_file(folder: Path, content: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_windows_are_the_text_in_order_each_behind_the_tokenizers_prefix(tokenizer: object, tmp_path: Path) -> None:
    text = "Once upon a time there was a little cat. " * 20
    prefix, ids = text_prefix(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = rows_of_text(text_file(tmp_path, text), tokenizer, context=512, seq_len=32)

    body = 32 - len(prefix)
    assert rows.input_ids.shape == (len(ids) // body, 32)
    assert rows.input_ids[:, : len(prefix)].tolist() == [prefix] * len(rows.input_ids)
    assert rows.input_ids[:, len(prefix) :].flatten().tolist() == ids[: len(ids) // body * body]
    assert rows.position_ids.tolist() == [list(range(32))] * len(rows.input_ids)
    assert rows.counted.tolist() == [[True] * 31 + [False]] * len(rows.input_ids)


def test_a_text_shorter_than_a_window_is_one_short_row(tokenizer: object, tmp_path: Path) -> None:
    rows = rows_of_text(text_file(tmp_path, "Once upon a time"), tokenizer, context=512)

    assert rows.input_ids.shape == (1, len(tokenizer("Once upon a time")["input_ids"]))


def test_json_lines_are_joined_by_the_end_token(tokenizer: object, tmp_path: Path) -> None:
    path = text_file(tmp_path, "\n".join(json.dumps({"text": t}) for t in ("One day", "A dog")), "texts.jsonl")

    rows = rows_of_text(path, tokenizer, context=512)

    each = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("One day", "A dog")]
    end = tokenizer.eos_token_id
    assert rows.input_ids[0].tolist() == [*text_prefix(tokenizer), *each[0], end, *each[1], end]


def test_no_more_rows_than_the_tokens_asked_for(tokenizer: object, tmp_path: Path) -> None:
    path = text_file(tmp_path, "Once upon a time there was a little cat. " * 200)

    rows = rows_of_text(path, tokenizer, context=512, seq_len=64, max_tokens=130)

    assert rows.input_ids.shape == (3, 64)
    assert rows.num_counted == 189


def test_the_built_in_text_fills_rows(tokenizer: object) -> None:
    assert rows_of_text(default_text(), tokenizer, context=512, max_tokens=1000).input_ids.shape == (2, 512)


def test_a_line_separator_inside_a_text_is_part_of_it(tokenizer: object, tmp_path: Path) -> None:
    text = "One day\u2028a dog"
    path = text_file(tmp_path, json.dumps({"text": text}, ensure_ascii=False), "texts.jsonl")

    assert rows_of_text(path, tokenizer, context=512).input_ids[0].tolist() == tokenizer(text)["input_ids"]


UNREADABLE = [
    ("", "a.txt", "is empty"),
    ("{}", "a.jsonl", "`text`"),
    ("nope", "a.jsonl", "JSON lines"),
    (None, "a.txt", "no text file"),
    ('{"text": "one"}\n{"text": 5}', "a.jsonl", "that of record 2 is 5, not a string"),
    ('{"text": null}', "a.jsonl", "is None, not a string"),
]


@pytest.mark.parametrize(("content", "name", "message"), UNREADABLE)
def test_texts_that_cannot_be_read_are_refused(content: str | None, name: str, message: str, tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / name if content is None else text_file(tmp_path, content, name)

    with pytest.raises(UsageError, match=message):
        rows_of_text(path, tokenizer, context=512)


@pytest.mark.parametrize("seq_len", [0, 1, 513])
def test_rows_that_the_model_does_not_take_are_refused(seq_len: int, tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 to 512"):
        rows_of_text(text_file(tmp_path, "Once"), tokenizer, context=512, seq_len=seq_len)


def test_token_files_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (6, 20), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "rows.safetensors")

    rows = rows_of_tokens(tmp_path / "rows.safetensors", vocabulary=512, context=64, max_tokens=40)

    assert torch.equal(rows.input_ids, ids[:3].long())


NOT_ROWS = [
    ({"other": torch.zeros(2, 4)}, "no integer tensor input_ids"),
    ({"input_ids": torch.zeros(2, 4)}, "no integer tensor input_ids"),
    ({"input_ids": torch.full((2, 4), 600)}, "outside the model's vocabulary"),
    ({"input_ids": torch.zeros(2, 99, dtype=torch.int64)}, "rows of 99 tokens; the model takes 2 to 64"),
]


@pytest.mark.parametrize(("tensors", "message"), NOT_ROWS)
def test_token_files_of_another_kind_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "rows.safetensors")

    with pytest.raises(UsageError, match=message):
        rows_of_tokens(tmp_path / "rows.safetensors", vocabulary=512, context=64)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    text_file(tmp_path, "{broken", "tokenizer.json")
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
