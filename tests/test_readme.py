"""What the README tells people to type exists, and what lands is checked by the README's own test command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from quantkit.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
LINES = [part.strip() for line in BLOCKS.splitlines() for part in line.split("&&") if part.strip().startswith("quantkit ")]


@pytest.mark.parametrize("line", LINES)
def test_every_quantkit_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    context = click.Context(cli)
    command: click.Command = cli.get_command(context, words[0])
    words = words[1:]
    while isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0)) if words else command.get_command(context, "list")
    command.make_context(line, words)


def test_every_command_is_shown_in_the_readme() -> None:
    assert {shlex.split(line, comments=True)[1] for line in LINES} >= set(COMMANDS)


def test_what_lands_is_checked_by_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[test]' && python -m pytest -n 2" in README
    assert "python -m pytest -n 2" in script and "-e '.[test]'" in script
    assert "quantkit convert reference" in README and "quantkit convert reference" in script


def test_every_file_the_readme_names_is_there() -> None:
    names = re.findall(r"`((?:quantkit|recipes|evals|tests)/[\w/.-]*)`", README)
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]
