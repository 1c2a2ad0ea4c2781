"""`quantkit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from quantkit.cli.adapter_options import adapter_option, chosen
from quantkit.cli.engine_options import engine_options, sampling_options, split


@click.command()
@click.argument("source")
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options
@adapter_option
@engine_options
def chat(source: str, system: str | None, adapter: str | None, **options: Any) -> None:
    """Talk to the model SOURCE. /clear starts over, /exit or Ctrl-D ends; Ctrl-C ends an answer."""
    from quantkit.errors import RequestError

    lora = chosen(adapter, options["lora"])
    from quantkit.runtime.llm import LLM

    engine, sampling = split(options)
    llm = LLM(source, **engine)
    name = llm.engine.loaded.name + (f" with {lora}" if lora else "")
    click.echo(f"{name}; KV cache: {llm.engine.describe_cache()}. /clear starts over, /exit ends.", err=True)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while (said := _ask()) is not None:
        if said == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(llm, messages, lora, sampling)
        except RequestError as error:
            click.echo(f"Error: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """What the user says next, None at the end."""
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if said:
            return None if said == "/exit" else said


def _answer(llm: Any, messages: list[dict[str, str]], lora: str | None, sampling: dict[str, Any]) -> str:
    parts: list[str] = []
    try:
        for piece in llm.stream(llm.chat_prompt(messages), lora=lora, **sampling):
            parts.append(piece)
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        pass
    click.echo()
    return "".join(parts)
