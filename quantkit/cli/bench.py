"""`quantkit bench`: measurements that anyone can repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.counts import counts

if TYPE_CHECKING:
    from quantkit.bench.compare_engines import Comparison


@click.group()
def bench() -> None:
    """Measure what quantkit takes on this machine."""


@bench.command()
@click.option("--only", help="Cases whose name contains this.")
@click.option("--work", type=click.Path(exists=True, file_okay=False), help="Folder for models and outputs (2.6 GB for the largest case).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def convert(only: str | None, work: str | None, as_json: bool) -> None:
    """Time and memory of converting random models: one of 2 GB without data, and calibrated ones of two depths."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from quantkit.bench.convert import CASES, machine, measure
    from quantkit.errors import UsageError

    cases = tuple(case for case in CASES if only is None or only in case.name)
    if not cases:
        raise UsageError(f"no case contains {only!r}; cases are {', '.join(case.name for case in CASES)}")
    click.echo(f"machine: {machine()}", err=True)
    if not as_json:
        click.echo("| case | recipe | model | private memory | resident | wall | processor |\n|---|---|---|---|---|---|---|")
    for result in measure(cases, Path(work) if work else None):
        usage = result.usage
        if as_json:
            click.echo(json.dumps(asdict(result)))
        else:
            click.echo(
                f"| {result.case.name} | {result.case.recipe} | {result.source_bytes / 1e6:,.0f} MB | {usage.peak_private / 1e6:,.0f} MB "
                f"| {usage.peak_resident / 1e6:,.0f} MB | {usage.seconds:.0f} s | {usage.cpu_seconds:.0f} s |"
            )


def _comparison(command: Callable[..., None]) -> Callable[..., None]:
    """SOURCE and the options of a comparison with other engines."""
    for option in reversed((
        click.argument("source", default="1b"),
        click.option("--output", "num_output", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate for each."),
        click.option("--threads", type=click.IntRange(1), default=2, show_default=True),
        click.option("--mode", type=click.Choice(["fast", "exact", "int8"]), default="fast", show_default=True),
        click.option("--llama-cpp", type=click.Path(exists=True, file_okay=False), help="Folder of llama.cpp's tools, to measure those too."),
        click.option("--work", type=click.Path(exists=True, file_okay=False), help="Folder where the models are kept that are made (8 GB for 1b)."),
    )):  # fmt: skip
        command = option(command)
    return command


def _compare(source: str, threads: int, mode: str, llama_cpp: str | None, work: str | None) -> Comparison:
    from pathlib import Path

    from quantkit.bench.compare_engines import Comparison

    return Comparison(source, threads, mode, Path(llama_cpp) if llama_cpp else None, Path(work) if work else None)


@bench.command()
@_comparison
@click.option("--requests", default="8,32", show_default=True, callback=counts, help="Requests at once, as 1,8,32.")
@click.option("--prompt", "num_prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--transformers/--no-transformers", default=True, help="Measure transformers' generate on the unquantized model too.")
def throughput(requests: list[int], num_prompt: int, num_output: int, transformers: bool, **setting: Any) -> None:
    """Tokens a second of many requests at once: an unquantized Llama SOURCE, as it is and in 4 bits.

    SOURCE is a model, or `1b` for random weights of Llama-3.2-1B's shape.
    """
    for line in _compare(**setting).throughput(requests, num_prompt, num_output, with_transformers=transformers):
        click.echo(line)


@bench.command()
@_comparison
@click.option("--prompt", "num_prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
def latency(num_prompt: int, num_output: int, **setting: Any) -> None:
    """One request: prompt and output tokens a second, and the time to the first token with a cached beginning.

    SOURCE is an unquantized Llama model, run as it is and in 4 bits, or `1b` for random weights of Llama-3.2-1B's shape.
    """
    for line in _compare(**setting).latency(num_prompt, num_output):
        click.echo(line)


@bench.command()
@click.argument("source", default="reference")
@click.option("--task", "name", default="reference_mmlu", show_default=True, help="A task or group of lm-eval's.")
@click.option("--num-fewshot", type=click.IntRange(0), default=5, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Documents of each task, the first ones.  [default: all]")
@click.option("--batch-sizes", default="1,8", show_default=True, callback=counts, help="Of lm-eval's own class.")
@click.option("--mode", type=click.Choice(["fast", "exact", "int8"]), default="fast", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), default=2, show_default=True)
def tasks(source: str, name: str, num_fewshot: int, limit: int | None, batch_sizes: list[int], mode: str, threads: int) -> None:
    """Time of lm-eval's tasks on our runtime and on `lm_eval --model hf`, in float32, on a CPU."""
    import torch

    from quantkit.bench.convert import machine
    from quantkit.evaluation.harness_speed import task_times
    from quantkit.evaluation.suite import SuiteTask

    torch.set_num_threads(threads)
    task = SuiteTask(task=name, num_fewshot=num_fewshot, limit=limit)
    click.echo(f"{machine()}, {threads} threads; {name}, {num_fewshot} shots\n\n| backend | seconds | score | times as long |\n|---|---|---|---|")
    own = 0.0
    for found in task_times(source, task, mode=mode, dtype="float32", batch_sizes=tuple(batch_sizes)):
        own = own or found.seconds
        click.echo(f"| {found.backend} | {found.seconds:.1f} | {found.score:.4f} | {found.seconds / own:.2f} |")


@bench.command()
@click.argument("source", default="reference")
@click.option("--quantization", help="Quantize an unquantized model while it loads: int8, fp8, w4 or nf4.")
@click.option("--tokens", "num_tokens", type=click.IntRange(1), default=4096, show_default=True, help="About how many tokens of text.")
@click.option("--threads", type=click.IntRange(1, 1024), default=2, show_default=True)
def modes(source: str, quantization: str | None, num_tokens: int, threads: int) -> None:
    """What the modes `fast` and `int8` cost: KL divergence from the exact one over the same weights, on prose of the reference model."""
    import torch

    from quantkit.bench.modes import mode_costs

    torch.set_num_threads(threads)
    click.echo("| mode | tokens | KL, nats a token | same most likely token |\n|---|---|---|---|")
    for mode, found in mode_costs(source, quantization=quantization, num_tokens=num_tokens):
        click.echo(f"| {mode} | {found.num_tokens:,} | {found.kl_mean:.5f} | {found.top1:.2%} |")


@bench.command()
@click.argument("source")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--requests", "count", default=200, show_default=True, help="How many of the trace's requests.")
@click.option("--at-once", default=16, show_default=True, help="Requests that run at any time.")
@click.option("--scale", default=32, show_default=True, help="Divides every length of the trace.")
@click.option("--threads", default=2, show_default=True)
@click.option("--prefix-caching/--no-prefix-caching", default=True)
def trace(source: str, file: str, count: int, at_once: int, scale: int, threads: int, prefix_caching: bool) -> None:
    """Replay the requests of a published trace FILE (Mooncake's JSONL, Azure's CSV) on the model SOURCE."""
    from pathlib import Path

    import torch

    from quantkit.bench.convert import machine
    from quantkit.bench.trace import load_trace, replay
    from quantkit.runtime.llm import LLM

    torch.set_num_threads(threads)
    llm = LLM(source, prefix_caching=prefix_caching, max_sequences=at_once)
    vocabulary = int(llm.engine.loaded.config.get_text_config().vocab_size)
    requests = load_trace(Path(file), count=count, scale=scale, context=llm.engine.context, vocabulary=vocabulary)
    click.echo(f"{machine()}; KV cache: {llm.engine.describe_cache()}", err=True)
    found = replay(llm, requests, at_once=at_once)
    click.echo(
        f"{found.num_requests} requests, {found.num_prompt:,} prompt and {found.num_output:,} output tokens in {found.seconds:.1f} s\n"
        f"prefix cache: {found.num_cached:,} prompt tokens ({found.num_cached / found.num_prompt:.1%}) found; "
        f"an endless cache would hold {found.num_repeated:,} ({found.num_repeated / found.num_prompt:.1%})\n"
        f"first token: median {1000 * found.percentile(0.5):.0f} ms, 95% {1000 * found.percentile(0.95):.0f} ms; preemptions: {found.num_preemptions}"
    )


@bench.command()
@click.option("--only", help="Cases whose name contains this.")
@click.option("--llama-cpp", type=click.Path(exists=True, file_okay=False), help="Folder of llama.cpp's tools, to measure those too.")
@click.option("--work", type=click.Path(exists=True, file_okay=False), help="Folder for models (5 GB).")
def load(only: str | None, llama_cpp: str | None, work: str | None) -> None:
    """Memory and time of loading a random model of 0.9 GB, and its conversions."""
    from pathlib import Path

    from quantkit.bench.convert import machine
    from quantkit.bench.llama_cpp_peer import LlamaCpp
    from quantkit.bench.load import CASES, KV_BYTES, PeerResult, measure
    from quantkit.errors import UsageError

    cases = tuple(case for case in CASES if only is None or only in case.name)
    if not cases:
        raise UsageError(f"no case contains {only!r}; cases are {', '.join(case.name for case in CASES)}")
    click.echo(f"machine: {machine()}; a cache of {KV_BYTES / 1e6:,.0f} MB", err=True)
    click.echo("| case | packed model | private | resident | private of imports | peak over model and cache | wall |\n|---|---|---|---|---|---|---|")
    for result in measure(cases, Path(work) if work else None, peer=LlamaCpp(Path(llama_cpp), 2) if llama_cpp else None):
        if isinstance(result, PeerResult):
            name, size, own = result.name, result.file_bytes, "| |"
        else:
            name, size, own = result.case.name, result.packed_bytes, f"{result.import_bytes / 1e6:,.0f} MB | {result.ratio:.2f} |"
        usage = result.usage
        memory = f"{usage.peak_private / 1e6:,.0f} MB | {usage.peak_resident / 1e6:,.0f} MB"
        click.echo(f"| {name} | {size / 1e6:,.0f} MB | {memory} | {own} {usage.seconds:.0f} s |")
