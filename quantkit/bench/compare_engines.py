"""Our engine, transformers' generate and llama.cpp on one model in one run, as rows of a table."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quantkit.bench import transformers_peer
from quantkit.bench.convert import machine
from quantkit.bench.engine import Throughput, first_token, make_prompts, prefix_hit, throughput
from quantkit.bench.llama_cpp_peer import LlamaCpp, write_gguf
from quantkit.bench.process import run
from quantkit.bench.random_checkpoint import write_random_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.runtime.llm import LLM

LLAMA_1B = {
    "layers": 16, "hidden": 2048, "intermediate": 8192, "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 4096,
}  # fmt: skip
_PREFILL, _SHARED = 512, 700


def compare(
    source: str, requests: list[int], num_prompt: int, num_output: int, *, threads: int, mode: str, with_transformers: bool, tools: Path | None,
    work: Path | None,
) -> Iterator[str]:  # fmt: skip
    """Markdown, line by line as it is measured.

    Args:
        source: "1b", or an unquantized Llama model.
        tools: llama.cpp's tools, None to leave it out.
        work: where the models are kept, for the next run too; None for a folder that is gone afterwards.
    """
    torch.set_num_threads(threads)
    yield f"{machine()}, {threads} threads, mode {mode}; prompts of {num_prompt} tokens, {num_output} generated\n"
    yield "| what | requests | output tokens/s | overhead of a step |\n|---|---|---|---|"
    with _folder(work, source) as folder:
        dense = _model(source, folder)
        small = folder / "w4"
        if not small.exists():
            run([sys.executable, "-m", "quantkit", "convert", str(dense), "-o", str(small), "-r", "w4a16-rtn"])
        for name, model in (("quantkit, 4 bits", small), ("quantkit, unquantized", dense)):
            llm = LLM(str(model), mode=mode)
            vocabulary = int(llm.engine.loaded.config.vocab_size)
            throughput(llm, make_prompts(1, 8, vocabulary, seed=99), 2)
            for count in requests:
                yield _row(name, throughput(llm, make_prompts(count, num_prompt, vocabulary), num_output))
            yield from _latencies(name, llm, vocabulary)
            del llm
        if with_transformers:
            dtype = torch.bfloat16 if mode == "fast" else torch.float32
            for count in requests:
                prompts = make_prompts(count, num_prompt, vocabulary)
                found = transformers_peer.throughput(dense, prompts, num_output, dtype=dtype)
                yield _row(f"transformers generate, one by one, {str(dtype)[6:]}", found)
        if tools:
            yield from _llama_cpp(LlamaCpp(tools, threads), dense, folder, requests, num_prompt, num_output, vocabulary)


@contextmanager
def _folder(work: Path | None, source: str) -> Iterator[Path]:
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = work / Path(source).name
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _model(source: str, folder: Path) -> Path:
    if source != "1b":
        return resolve(source).folder
    if not (folder / "dense").exists():
        write_random_checkpoint(folder / "dense", **LLAMA_1B)
    return folder / "dense"


def _row(name: str, found: Throughput) -> str:
    overhead = "" if found.overhead_ms is None else f"{found.overhead_ms:.2f} ms"
    return f"| {name} | {found.num_requests} | {found.output_tokens_per_second:.1f} | {overhead} |"


def _latencies(name: str, llm: LLM, vocabulary: int) -> Iterator[str]:
    prefill = min(first_token(llm, make_prompts(1, _PREFILL, vocabulary, seed=seed)[0]) for seed in (50, 51))
    cold, warm = prefix_hit(llm, _SHARED, vocabulary)
    yield f"| {name}: prefill of {_PREFILL} tokens | 1 | {_PREFILL / prefill:.0f} prompt tokens/s | |"
    yield f"| {name}: first token behind {_SHARED} tokens, new and cached | 1 | {1000 * cold:.0f} ms, {1000 * warm:.0f} ms: {cold / warm:.1f}x | |"


def _llama_cpp(peer: LlamaCpp, dense: Path, folder: Path, requests: list[int], num_prompt: int, num_output: int, vocabulary: int) -> Iterator[str]:
    whole = folder / "f16.gguf"
    for kind in ("Q4_0", "Q8_0"):
        model = folder / f"{kind}.gguf"
        if not model.exists():
            peer.quantize(whole if whole.exists() else write_gguf(dense, whole), model, kind)
        prefill, decode = peer.prefill_and_decode(model, _PREFILL, num_output)
        yield f"| llama.cpp {kind}: prefill of {_PREFILL} tokens | 1 | {prefill:.0f} prompt tokens/s; decode {decode:.1f} | |"
        for count in requests:
            yield _row(f"llama.cpp {kind}", peer.throughput(model, make_prompts(count, num_prompt, vocabulary), num_output))
