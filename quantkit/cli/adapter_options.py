"""LoRA adapters on the command line: `--lora NAME=FOLDER` loads one, `--adapter NAME` chooses which of them answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from quantkit.errors import UsageError, did_you_mean


def _by_name(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for each in given:
        name, _equals, folder = each.partition("=")
        if not name.strip() or not folder:
            raise UsageError(f"--lora is {each!r}; give NAME=FOLDER, such as mine=./adapter")
        if name in folders:
            raise UsageError(f"--lora names {name!r} twice; give each adapter a name of its own")
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UsageError(f"--lora {each}: there is no folder {path}")
        folders[name] = str(path)
    return folders


lora_option = click.option(
    "--lora", multiple=True, metavar="NAME=FOLDER", callback=_by_name, help="A LoRA adapter in PEFT's format, and what to call it; may be repeated."
)
adapter_option = click.option("--adapter", metavar="NAME", help="The adapter that answers.  [default: the only one given]")


def chosen(adapter: str | None, given: Mapping[str, str]) -> str | None:
    """The adapter that answers, None for the model itself.

    Raises:
        UsageError: there is no such adapter, or there are several and none is named.
    """
    if adapter is None and len(given) > 1:
        raise UsageError(f"--lora gives {len(given)} adapters; choose one with --adapter: {', '.join(given)}")
    if adapter is None:
        return next(iter(given), None)
    if not given:
        raise UsageError(f"--adapter is {adapter!r}, and no adapter is given; give it with --lora {adapter}=FOLDER")
    if adapter not in given:
        raise UsageError(f"no adapter {adapter!r} is given; {did_you_mean(adapter, given)}")
    return adapter
