"""Our engine, transformers' generate and llama.cpp on one model in one run, as rows of a table."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.bench import transformers_peer
from quantkit.bench.convert import machine
from quantkit.bench.engine import Throughput, decode_rate, first_token, make_prompts, prefix_hit, throughput
from quantkit.bench.llama_cpp_peer import LlamaCpp, write_gguf
from quantkit.bench.process import run
from quantkit.bench.random_checkpoint import write_random_checkpoint
from quantkit.checkpoint.source import resolve
from quantkit.runtime.llm import LLM

LLAMA_1B = {
    "layers": 16, "hidden": 2048, "intermediate": 8192, "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 4096,
}  # fmt: skip
SHARED = 700
"""Tokens of the prompt that many requests begin with."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared and where; every method yields Markdown, line by line as it is measured.

    Attributes:
        source: "1b", or an unquantized Llama model.
        tools: llama.cpp's tools, None to leave it out.
        work: where the models are kept, for the next run too; None for a folder that is gone afterwards.
    """

    source: str
    threads: int
    mode: str
    tools: Path | None = None
    work: Path | None = None

    def throughput(self, requests: list[int], num_prompt: int, num_output: int, *, with_transformers: bool) -> Iterator[str]:
        """Tokens a second of many requests at once."""
        yield f"{self._setting()}; prompts of {num_prompt} tokens, {num_output} generated\n"
        yield "| what | requests | output tokens/s | overhead of a step |\n|---|---|---|---|"
        with self._folder() as folder:
            for name, model in _ours(folder):
                llm = LLM(str(model), mode=self.mode)
                vocabulary = llm.engine.loaded.vocabulary
                throughput(llm, make_prompts(1, 8, vocabulary, seed=99), 2)
                for count in requests:
                    yield _row(name, throughput(llm, make_prompts(count, num_prompt, vocabulary), num_output))
                del llm
            if with_transformers:
                for dtype in (torch.float32, torch.bfloat16):  # which of them is faster depends on the processor
                    for count in requests:
                        prompts = make_prompts(count, num_prompt, vocabulary)
                        found = transformers_peer.throughput(_dense(folder), prompts, num_output, dtype=dtype)
                        yield _row(f"transformers generate, one by one, {str(dtype)[6:]}", found)
            for kind, model, peer in self._llama_cpp(folder):
                for count in requests:
                    yield _row(f"llama.cpp {kind}", peer.throughput(model, make_prompts(count, num_prompt, vocabulary), num_output))

    def latency(self, num_prompt: int, num_output: int) -> Iterator[str]:
        """One request: how fast its prompt is read, how fast it goes on, and what a cached beginning saves."""
        yield f"{self._setting()}; a prompt of {num_prompt} tokens, {num_output} generated\n"
        yield f"| what | prompt tokens/s | output tokens/s | first token behind {SHARED} tokens: new, cached |\n|---|---|---|---|"
        with self._folder() as folder:
            for name, model in _ours(folder):
                llm = LLM(str(model), mode=self.mode)
                vocabulary = llm.engine.loaded.vocabulary
                first_token(llm, make_prompts(1, 8, vocabulary, seed=99)[0])
                prefill = min(first_token(llm, make_prompts(1, num_prompt, vocabulary, seed=seed)[0]) for seed in (50, 51, 52))
                decode = decode_rate(llm, make_prompts(1, num_prompt, vocabulary, seed=53)[0], num_output)
                cold, warm = prefix_hit(llm, SHARED, vocabulary)
                hit = f"{1000 * cold:.0f} ms, {1000 * warm:.0f} ms: {cold / warm:.1f}x"
                yield f"| {name} | {num_prompt / prefill:.1f} | {decode:.1f} | {hit} |"
                del llm
            for kind, model, peer in self._llama_cpp(folder):
                prefill, decode = peer.prefill_and_decode(model, num_prompt, num_output)
                yield f"| llama.cpp {kind} | {prefill:.1f} | {decode:.1f} | |"

    def _setting(self) -> str:
        torch.set_num_threads(self.threads)
        return f"{machine()}, {self.threads} threads, mode {self.mode}"

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The folder of this source's models, those made by ourselves in it."""
        if self.work is None:
            with tempfile.TemporaryDirectory() as folder:
                yield self._made(Path(folder))
        else:
            folder = self.work / Path(self.source).name
            folder.mkdir(parents=True, exist_ok=True)
            yield self._made(folder)

    def _made(self, folder: Path) -> Path:
        dense = folder / "dense"
        if not dense.exists():
            if self.source == "1b":
                write_random_checkpoint(dense, **LLAMA_1B)
            else:
                dense.symlink_to(resolve(self.source).folder.resolve())
        if not (folder / "w4").exists():
            run([sys.executable, "-m", "quantkit", "convert", str(dense), "-o", str(folder / "w4"), "-r", "w4a16-rtn"])
        return folder

    def _llama_cpp(self, folder: Path) -> Iterator[tuple[str, Path, LlamaCpp]]:
        if self.tools is None:
            return
        peer, whole = LlamaCpp(self.tools, self.threads), folder / "f16.gguf"
        for kind in ("Q4_0", "Q8_0"):
            model = folder / f"{kind}.gguf"
            if not model.exists():
                peer.quantize(whole if whole.exists() else write_gguf(_dense(folder), whole), model, kind)
            yield kind, model, peer


def _dense(folder: Path) -> Path:
    return (folder / "dense").resolve()


def _ours(folder: Path) -> tuple[tuple[str, Path], ...]:
    return ("quantkit, 4 bits", folder / "w4"), ("quantkit, unquantized", _dense(folder))


def _row(name: str, found: Throughput) -> str:
    overhead = "" if found.overhead_ms is None else f"{found.overhead_ms:.2f} ms"
    return f"| {name} | {found.num_requests} | {found.output_tokens_per_second:.1f} | {overhead} |"
