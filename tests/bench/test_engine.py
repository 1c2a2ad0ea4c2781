"""The engine's benchmark counts what it says it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from quantkit.bench.compare_engines import Comparison
from quantkit.bench.engine import make_prompts, prefix_hit, throughput
from quantkit.bench.llama_cpp_peer import write_gguf
from quantkit.bench.random_checkpoint import write_random_checkpoint
from quantkit.runtime.llm import LLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("reference", kv_cache_memory=8 << 20)


def test_all_tokens_asked_for_are_generated(llm: LLM) -> None:
    before = llm.engine.stats.num_generated_tokens

    found = throughput(llm, make_prompts(3, 10, 4096), 5)

    assert llm.engine.stats.num_generated_tokens - before == 15 == found.num_requests * found.num_output_tokens
    assert found.overhead_ms is not None and found.overhead_ms > 0
    assert found.output_tokens_per_second == pytest.approx(15 / found.seconds)


def test_a_cached_prefix_is_measured_as_one(llm: LLM) -> None:
    before = llm.engine.stats.num_cached_tokens

    cold, warm = prefix_hit(llm, 64, 4096, repeats=2)

    assert llm.engine.stats.num_cached_tokens - before == 2 * 64 and cold > 0 and warm > 0


def rows_of(lines: Iterable[str]) -> list[str]:
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| what")]


@pytest.fixture
def comparison(tmp_path: Path) -> Iterator[Comparison]:
    threads = torch.get_num_threads()
    yield Comparison("reference", threads=1, mode="fast", work=tmp_path)
    torch.set_num_threads(threads)


def test_every_row_of_the_comparison_is_there_and_its_models_are_kept(comparison: Comparison, tmp_path: Path) -> None:
    rows = rows_of(comparison.throughput([1, 2], 8, 3, with_transformers=True))

    peers = [f"transformers generate, one by one, {dtype}" for dtype in ("float32", "bfloat16")]
    assert [rows.count(name) for name in ("quantkit, 4 bits", "quantkit, unquantized", *peers)] == [2, 2, 2, 2]
    assert sorted(folder.name for folder in (tmp_path / "reference").iterdir()) == ["dense", "w4"]


def test_latencies_are_of_both_models(comparison: Comparison) -> None:
    assert rows_of(comparison.latency(16, 3)) == ["quantkit, 4 bits", "quantkit, unquantized"]


def test_the_gguf_peer_holds_the_models_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", layers=1, hidden=128, intermediate=256)

    file = write_gguf(tmp_path / "model", tmp_path / "model.gguf")

    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(file).tensors}
    source = load_file(next((tmp_path / "model").glob("*.safetensors")))
    assert len(tensors) == len(source)
    assert torch.equal(tensors["blk.0.ffn_down.weight"], source["model.layers.0.mlp.down_proj.weight"].half())
    q = source["model.layers.0.self_attn.q_proj.weight"].half()
    assert torch.equal(tensors["blk.0.attn_q.weight"][[0, 1]], q[[0, 32]])


