"""Numbers of something on the command line: 1,8,32."""

from __future__ import annotations

import click


def counts(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    """As a callback of an option; raises click.BadParameter."""
    found = [part.strip() for part in text.split(",")]
    if not all(count.isdecimal() and int(count) for count in found):
        raise click.BadParameter(f"{text!r} is no list of whole numbers of at least 1, as 1,8,32", context, option)
    return [int(count) for count in found]
