"""`quantkit chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Any

import click

from quantkit.cli.engine_options import engine_options, sampling_options, split


@click.command()
@click.argument("source")
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options
@engine_options
def chat(source: str, system: str | None, **options: Any) -> None:
    """Talk to the model SOURCE. /clear starts over, /exit or Ctrl-D ends; Ctrl-C ends an answer."""
    from quantkit.errors import RequestError
    from quantkit.runtime.llm import LLM

    engine, sampling = split(options)
    llm = LLM(source, **engine)
    click.echo(f"{llm.engine.loaded.name}; KV cache: {llm.engine.describe_cache()}. /clear starts over, /exit ends.", err=True)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while (said := _ask()) is not None:
        if said == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(llm, messages, sampling)
        except RequestError as error:
            click.echo(f"Error: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """What the user says next, None at the end."""
    while True:
        try:
            said = input("> " if click.get_text_stream("stdin").isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if said:
            return None if said == "/exit" else said


def _answer(llm: Any, messages: list[dict[str, str]], sampling: dict[str, Any]) -> str:
    parts: list[str] = []
    try:
        for piece in llm.stream(llm.chat_prompt(messages), **sampling):
            parts.append(piece)
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        pass
    click.echo()
    return "".join(parts)
