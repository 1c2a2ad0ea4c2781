"""Traces become requests of the right lengths with the right prefixes in common, and are answered whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.bench.trace import load_trace, replay
from quantkit.errors import UsageError
from quantkit.runtime.llm import LLM


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    rows = [(1024, 64, [0, 1]), (1500, 320, [0, 2, 3]), (1024, 64, [0, 1]), (100_000, 64, list(range(5, 201)))]
    lines = (json.dumps({"timestamp": 0, "input_length": i, "output_length": o, "hash_ids": h}) for i, o, h in rows)
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    return tmp_path / "trace.jsonl"


def test_equal_hashes_are_equal_tokens(mooncake: Path) -> None:
    a, b, again, long = load_trace(mooncake, count=10, scale=32, context=1024, vocabulary=4096)

    assert [len(r.prompt) for r in (a, b, again, long)] == [32, 46, 32, 1021]
    assert [r.num_output for r in (a, b, again, long)] == [2, 10, 2, 2]
    assert a.prompt == again.prompt and a.prompt[:16] == b.prompt[:16] and a.prompt[16:] != b.prompt[16:32]


def test_a_replay_answers_all_and_finds_what_was_there(mooncake: Path) -> None:
    requests = load_trace(mooncake, count=3, scale=32, context=1024, vocabulary=4096)

    found = replay(LLM("reference", kv_cache_memory=8 << 20), requests, at_once=1)

    assert (found.num_requests, found.num_output, len(found.first_tokens)) == (3, 14, 3)
    assert found.num_cached == found.num_repeated == 16 + 16


def test_azure_traces_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023,374,44\n2023,374,109")

    first, second = load_trace(tmp_path / "trace.csv", count=5, scale=4, context=1024, vocabulary=4096)

    assert (len(first.prompt), first.num_output, second.num_output) == (93, 11, 27) and first.prompt != second.prompt


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text('{"a": 1}\n')

    with pytest.raises(UsageError, match="is no trace that is read here"):
        load_trace(tmp_path / "trace.jsonl", count=5, scale=4, context=1024, vocabulary=4096)
