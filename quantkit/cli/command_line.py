"""The command as it was given: results say what made them."""

from __future__ import annotations

import shlex

import click


def command_line() -> str:
    """Of the command that runs."""
    arguments = click.get_current_context().find_root().obj or []
    return shlex.join(["quantkit", *arguments])
