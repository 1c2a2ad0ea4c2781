"""`quantkit generate`: continue a prompt, text on stdout and nothing else."""

from __future__ import annotations

import sys
from typing import Any

import click

from quantkit.cli.adapter_options import adapter_option, chosen
from quantkit.cli.engine_options import engine_options, sampling_options, split
from quantkit.cli.structure_options import structure_options, take_structure
from quantkit.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--prompt", "-p", help="The text to continue; '-' reads it from standard input.")
@click.option("--chat/--no-chat", default=False, help="Put the prompt into the model's chat template.")
@structure_options
@sampling_options
@adapter_option
@engine_options
def generate(source: str, prompt: str | None, chat: bool, adapter: str | None, **options: Any) -> None:
    """Continue a prompt with the model SOURCE: a folder of any container that quantkit reads, a hub id, or `reference`.

    \b
    quantkit generate out --prompt "Once upon a time" --max-tokens 64
    echo "Once upon a time" | quantkit generate reference --prompt - --temperature 0
    quantkit generate out --prompt "Tom is" --json-schema '{"type": "object", "properties": {"age": {"type": "integer"}}}'
    quantkit generate out --prompt "Once" --lora tales=./adapter
    """
    if prompt is None:
        raise UsageError("give --prompt TEXT, or --prompt - to read it from standard input")
    lora, structure = chosen(adapter, options["lora"]), take_structure(options)
    from quantkit.runtime.llm import LLM

    engine, sampling = split(options)
    text = _standard_input() if prompt == "-" else prompt
    llm = LLM(source, **engine)
    start = llm.chat_prompt([{"role": "user", "content": text}]) if chat else text
    for piece in llm.stream(start, lora=lora, structure=structure, **sampling):
        click.echo(piece, nl=False)
    click.echo()


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; give text") from error
