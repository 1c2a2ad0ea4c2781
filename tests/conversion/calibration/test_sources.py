"""Files of every kind are read, only as far as needed, and refused with their place when they are broken."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from quantkit.conversion.calibration import KNOWN_DATASETS, CalibrationOptions, load_calibration
from quantkit.conversion.calibration import sources as sources_module
from quantkit.conversion.calibration.default import default_path
from quantkit.conversion.calibration.records import SECTION, Budget, join_articles, read_records, sections
from quantkit.conversion.calibration.sources import open_source
from quantkit.errors import CalibrationError, UsageError

TEXTS = [f"Document number {i} speaks of the sea, of the wind and of {i * i} gulls — and ends." for i in range(40)]


def texts_of(path: Path | str, budget: int = 1 << 30) -> list[str]:
    return [record["text"] for record in read_records(Path(path), Budget(budget), random.Random(0))]


def write_parquet(path: Path, texts: list[str], rows_a_group: int = 8) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=rows_a_group)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *enumerate(TEXTS)])


KINDS = {
    "d.jsonl": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())),
    "d.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8"),
    "nested.json": lambda path: path.write_text(json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}), encoding="utf-8"),
    "lines.json": lambda path: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"),
    "d.parquet": lambda path: write_parquet(path, TEXTS),
    "d.csv": write_csv,
    "d.txt": lambda path: path.write_text("<|endoftext|>".join(TEXTS), encoding="utf-8"),
    "d.raw": lambda path: path.write_text("<|endoftext|>".join(TEXTS), encoding="utf-8"),
    "bom.txt": lambda path: path.write_text("\ufeff" + "<|endoftext|>".join(TEXTS), encoding="utf-8"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_documents(name, tmp_path):
    KINDS[name](tmp_path / name)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_calibrates(name, tmp_path, byte_tokenizer):
    KINDS[name](tmp_path / name)
    calibration = load_calibration(CalibrationOptions(str(tmp_path / name), num_samples=8, seq_len=128), byte_tokenizer, context=512)
    assert calibration.report.rows == 8


def test_a_book_without_separators_is_one_long_text(write):
    paragraphs = [f"Paragraph {i}. " + "It was a dark and stormy night; " * 20 for i in range(300)]
    book = "\n\n".join(paragraphs)
    parts = texts_of(write("book.txt", book))
    assert "".join(parts) == book
    assert all(SECTION // 2 < len(part) <= SECTION * 3 // 2 for part in parts)
    assert all(part.endswith("\n\n") for part in parts[:-1])


@pytest.mark.parametrize("text", ["", "x" * 200_000, "word " * 50_000, "line\n" * 50_000])
def test_sections_join_to_the_text(text):
    assert "".join(sections(text)) == text


@pytest.mark.parametrize("kind", ["jsonl", "txt", "jsonl.gz", "csv", "parquet"])
def test_a_file_beyond_the_budget_is_read_in_part_and_said(kind, tmp_path):
    texts = [f"{i:06d} " + "wörd " * 30 for i in range(4000)]
    path = tmp_path / f"big.{kind}"
    if kind == "parquet":
        write_parquet(path, texts, rows_a_group=100)
    else:
        rows = "".join(text + "<|endoftext|>" if kind == "txt" else f'"{text}"\n' for text in texts)
        data = ("text\n" + rows if kind == "csv" else rows).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    budget = Budget(min(100_000, path.stat().st_size // 2))
    read = [record["text"] for record in read_records(path, budget, random.Random(0))]
    assert 10 < len(read) < 2500
    assert len(budget.notes) == 1 and path.name in budget.notes[0]
    if kind in ("jsonl", "txt"):
        numbers = [int(text[:6]) for text in read if text[:6].isdigit()]
        assert max(numbers) > 3500 and min(numbers) < 100


def test_a_folder_gives_all_its_files(tmp_path, byte_tokenizer):
    for name in ("d.jsonl", "d.parquet", "d.txt"):
        KINDS[name](tmp_path / name)
    (tmp_path / "notes.pdf").write_bytes(b"not read")
    calibration = load_calibration(CalibrationOptions(str(tmp_path), num_samples=500, seq_len=64, layout="pad"), byte_tokenizer, context=512)
    assert calibration.report.rows == 3 * len(TEXTS)


def test_wikitext_rows_become_articles():
    rows = ["", " = One = \n", " First .\n", " = = Part = = \n", " Second .\n", " = Two = \n", " Third .\n"]
    assert [r["text"] for r in join_articles(iter({"text": row} for row in rows))] == ["", "".join(rows[1:5]), "".join(rows[5:])]


def test_fewer_rows_than_asked_are_made_and_said(write, byte_tokenizer):
    path = write("d.jsonl", [{"text": text} for text in TEXTS])
    report = load_calibration(CalibrationOptions(path, num_samples=1000, seq_len=256), byte_tokenizer, context=512).report
    assert 1 <= report.rows < 1000
    assert "fewer rows than the 1000 asked for" in report.summary()


GOOD_LINE = json.dumps({"text": "fine"}) + "\n"
BROKEN = {
    "empty": ("d.jsonl", b"", ["is empty"]),
    "blank": ("d.jsonl", b"\n\n", ["no calibration text"]),
    "only-empty-documents": ("d.jsonl", b'{"text": ""}\n{"text": "  "}\n', ["no calibration text", "2 records: empty"]),
    "too-short": ("d.txt", b"only a few words", ["17 tokens", "one row of 64", "16 rows need 1024 tokens"]),
    "not-utf8": ("d.txt", "naïve".encode("latin-1"), ["not UTF-8 at byte 2", "0xef"]),
    "not-utf8-line": ("d.jsonl", GOOD_LINE.encode() + '{"text": "naïve"}'.encode("latin-1"), [f"byte {len(GOOD_LINE) + 12}"]),
    "not-utf8-csv": ("d.csv", b"text\nfine\nna\xefve\n", ["not UTF-8 at byte 12"]),
    "utf16": ("d.txt", "hello".encode("utf-16"), ["UTF-16"]),
    "bad-line": ("d.jsonl", (GOOD_LINE * 2 + '{"text": \n').encode(), ["line 3 is not JSON"]),
    "list-line": ("d.jsonl", b"[1, 2]\n", ["line 1 is a JSON list"]),
    "bad-json": ("d.json", b'[{"text": "a"},\n {"text" "b"}]', ["not JSON", "line 2"]),
    "number-json": ("d.json", b"5", ["JSON int"]),
    "bad-parquet": ("d.parquet", b"PAR1 not really", ["not a readable parquet file"]),
    "bad-gzip": ("d.jsonl.gz", b"\x1f\x8b not really", ["not a whole gzip file"]),
    "cut-gzip": ("d.jsonl.gz", gzip.compress(GOOD_LINE.encode() * 500)[:-20], ["not a whole gzip file"]),
    "no-text-column": ("d.jsonl", b'{"a": "x", "b": "y"}\n', ["columns: a, b", "text_column"]),
    "unknown-kind": ("d.docx", b"PK", ["unknown kind", ".jsonl"]),
    "broken-thread": ("d.jsonl", b'{"message_id": "1", "parent_id": null, "role": null, "text": "x"}\n', ["threads"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_place(case, write, byte_tokenizer):
    name, content, words = BROKEN[case]
    path = write(name, content)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(CalibrationOptions(path, num_samples=16, seq_len=64), byte_tokenizer, context=512)
    assert all(word in str(caught.value) for word in [*words, name]), str(caught.value)


@pytest.mark.parametrize(
    "columns", [{"text_column": "txet"}, {"prompt_column": "txet", "response_column": "text"}, {"prompt_column": "text", "response_column": "txet"}]
)
def test_a_column_that_is_not_there_is_answered_with_near_ones(columns, write, byte_tokenizer):
    path = write("d.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(CalibrationError, match=r"no column 'txet'.*did you mean 'text'"):
        load_calibration(CalibrationOptions(path, **columns), byte_tokenizer, context=512)


def test_a_column_without_text_is_refused(write, byte_tokenizer):
    path = write("d.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(CalibrationError, match="'label' holds int"):
        load_calibration(CalibrationOptions(path, text_column="label"), byte_tokenizer, context=512)


def test_a_missing_file_names_what_lies_near(write, byte_tokenizer):
    path = write("calibration.jsonl", [{"text": "x"}])
    with pytest.raises(CalibrationError, match=r"no calibration file.*did you mean 'calibration.jsonl'"):
        load_calibration(CalibrationOptions(path.replace("calibration.jsonl", "calibratoin.jsonl")), byte_tokenizer, context=512)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, byte_tokenizer):
    (tmp_path / "PROVENANCE.md").write_text(" ".join(TEXTS))
    for name in ("wiki.utf8", "sub/code.utf8"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(" ".join(TEXTS))

    rows = load_calibration(CalibrationOptions(source=str(tmp_path), num_samples=2, seq_len=64), byte_tokenizer, context=64)
    (tmp_path / "PROVENANCE.md").unlink()

    assert "not read, being of no known kind: sub/code.utf8, wiki.utf8" in rows.report.summary()
    with pytest.raises(CalibrationError, match=r"holds no calibration file; it holds sub/code.utf8, wiki.utf8; known kinds: "):
        load_calibration(CalibrationOptions(source=str(tmp_path)), byte_tokenizer, context=64)


def test_an_empty_folder_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(CalibrationError, match="holds no calibration file"):
        load_calibration(CalibrationOptions(str(tmp_path)), byte_tokenizer, context=512)


def test_an_unknown_short_name_is_answered_with_near_ones(byte_tokenizer):
    with pytest.raises(CalibrationError, match="did you mean 'wikitext'"):
        load_calibration(CalibrationOptions("wikitex"), byte_tokenizer, context=512)


def test_rows_beyond_the_context_are_refused(byte_tokenizer):
    with pytest.raises(CalibrationError, match="seq_len 1024 is beyond the model's context of 512"):
        load_calibration(CalibrationOptions(seq_len=1024), byte_tokenizer, context=512)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 0},
        {"seq_len": 1},
        {"prompt_column": "a"},
        {"text_column": "t", "prompt_column": "a", "response_column": "b"},
        {"layout": "pak"},
    ],
)
def test_options_that_cannot_be_meant_do_not_exist(options):
    with pytest.raises(UsageError):
        CalibrationOptions(**options)


def test_a_split_that_leaves_nothing_is_refused(write, byte_tokenizer):
    path = write("d.jsonl", [{"text": text} for text in TEXTS])
    calibration = load_calibration(CalibrationOptions(path, num_samples=2, seq_len=64), byte_tokenizer, context=512)
    with pytest.raises(CalibrationError, match="hold out 2 of 2"):
        calibration.split(2)


class FakeDataset(list):
    """What datasets.load_dataset streams."""

    def shuffle(self, *, seed: int, buffer_size: int) -> FakeDataset:
        return FakeDataset(random.Random(seed).sample(self, len(self)))


def test_a_data_set_is_streamed_by_name_config_and_split(monkeypatch, byte_tokenizer):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"], kwargs["streaming"]))
        return FakeDataset({"text": text} for text in TEXTS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("org/name", "org/name:config", "org/name:config:validation", "org/name::test", "ultrachat_200k"):
        load_calibration(CalibrationOptions(source, num_samples=2, seq_len=64), byte_tokenizer, context=512)
    assert asked == [
        ("org/name", None, "train", True),
        ("org/name", "config", "train", True),
        ("org/name", "config", "validation", True),
        ("org/name", None, "test", True),
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft", True),
    ]


def test_an_unreachable_data_set_is_one_clear_message(monkeypatch, byte_tokenizer):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"cannot load the data set 'org/name'.*Couldn't reach the Hub\. .*built-in mix$"):
        load_calibration(CalibrationOptions("org/name"), byte_tokenizer, context=512)


def test_a_data_set_is_read_no_further_than_the_budget():
    endless = ({"text": "x" * 1000} for _ in iter(int, 1))
    budget = Budget(50_000)
    assert len(list(sources_module._within(endless, budget, "org/name"))) < 60
    assert "org/name" in budget.notes[0]


def test_short_names_name_a_data_set_of_the_hub():
    assert all(name.split(":")[0].count("/") == 1 for name in KNOWN_DATASETS.values())


def test_the_built_in_mix_ships_and_is_never_a_toy():
    kinds: dict[str, int] = {}
    total = 0
    with gzip.open(default_path(), "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            size = len(record["text"]) if "text" in record else sum(len(m["content"]) for m in record["messages"])
            kinds[record["kind"]] = kinds.get(record["kind"], 0) + size
            total += size
            assert record["licence"] and record["origin"]
            assert (default_path().parent / "licences" / f"{record['origin']}.txt").is_file() or record["origin"] == "quantkit"
    assert total > 3_000_000
    assert set(kinds) == {"prose", "dialogue", "code", "mathematics", "multilingual"}
    assert min(kinds.values()) > 0.05 * total


def test_what_is_held_out_of_the_built_in_mix_is_never_calibrated_on():
    def texts(seed: int, *, held_out: bool) -> set[str]:
        _, records = open_source(None, Budget(1 << 30), seed, held_out=held_out)
        return {json.dumps(record.get("text") or record["messages"]) for record in records}

    calibrating, measuring = texts(0, held_out=False) | texts(1, held_out=False), texts(0, held_out=True)

    assert not calibrating & measuring
    assert 1 / 20 < len(measuring) / len(calibrating) < 1 / 12


def test_the_built_in_mix_fills_the_default_rows(reference_tokenizer):
    report = load_calibration(CalibrationOptions(), reference_tokenizer, context=4096).report
    assert (report.rows, report.seq_len, report.num_tokens) == (256, 2048, 256 * 2048)
    assert report.num_documents > 200
