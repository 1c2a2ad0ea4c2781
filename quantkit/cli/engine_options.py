"""The options that every command which runs a model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from quantkit.cli.adapter_options import lora_option

_MODES = ("fast", "exact", "int8")
_MODE_HELP = "exact: float32, equal in any batch. int8: faster and less exact; quantized models on CPUs."
_KV_HELP = "auto (the checkpoint's own), float32, bfloat16, float16, int8, fp8."
_CONTEXT_HELP = "Tokens of prompt and answer; the model's own by default."
_QUANTIZATION_HELP = "Quantize an unquantized model while it loads: int8, fp8, w4 or nf4."
_OPTIONS = (
    click.option("--mode", type=click.Choice(_MODES), default="fast", show_default=True, help=_MODE_HELP),
    click.option("--quantization", help=_QUANTIZATION_HELP),
    lora_option,
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option("--kv-cache-dtype", default="auto", show_default=True, help=_KV_HELP),
    click.option("--context", type=click.IntRange(1), help=_CONTEXT_HELP),
    click.option("--draft", "speculation", help="Guess tokens ahead: ngram (from the text so far), or a smaller model with the same tokenizer."),
    click.option("--num-draft-tokens", type=click.IntRange(1), default=4, show_default=True, help="Tokens to guess ahead at most."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Threads on a CPU; its physical cores by default."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along."),
)
SCORING = (
    click.option("--mode", type=click.Choice(_MODES), default="fast", show_default=True, help=_MODE_HELP),
    click.option("--quantization", help=f"{_QUANTIZATION_HELP} Of MODEL alone."),
    click.option("--kv-cache-dtype", default="auto", show_default=True, help=f"{_KV_HELP} Of MODEL alone."),
    click.option("--context", type=click.IntRange(1), help=_CONTEXT_HELP),
)
"""Options of the engine that tasks are scored with; `eval` has --device and --trust-remote-code itself."""
_SAMPLING = (
    click.option("--max-tokens", type=click.IntRange(1), help="Tokens to generate at most."),
    click.option("--temperature", type=float, default=0.7, show_default=True, help="0 takes the most likely token always."),
    click.option("--top-p", type=float, default=1.0, show_default=True),
    click.option("--top-k", type=int, default=0, show_default=True),
    click.option("--min-p", type=float, default=0.0, show_default=True),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
    click.option("--stop", multiple=True, help="A string that ends the text; may be repeated."),
    click.option("--seed", type=int, help="The same text again for the same seed."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given, as keywords of LLM and of SamplingParams."""
    engine = engine_settings(options)
    return engine, options | {"stop": tuple(options["stop"])}


def engine_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take the engine's options out, as keywords of EngineOptions; threads are set and adapters looked at here.

    Raises:
        SourceError: what --lora names is no adapter.
    """
    threads = options.pop("threads")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if options["lora"]:
        from quantkit.runtime.lora import check

        check(options["lora"].values())
    names = ("mode", "quantization", "lora", "device", "kv_cache_dtype", "context", "speculation", "num_draft_tokens", "trust_remote_code")
    return {name: options.pop(name) for name in names}
