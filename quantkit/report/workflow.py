"""What `quantkit ci init` writes: a check file to be filled, and a GitHub Actions workflow that runs it."""

from __future__ import annotations

import re
from pathlib import Path

from quantkit.conversion.recipe import Recipe
from quantkit.errors import OutputError, UsageError
from quantkit.evaluation.document import write_text
from quantkit.evaluation.suite import Suite
from quantkit.formats.registry import get_format
from quantkit.report.check import CheckFile, ExpectedCheckpoint

_WORKFLOW = """\
# What quantization costs {source}: fails where a figure is worse than {check} says.
name: quantkit
on:
  push:
  pull_request:
  workflow_dispatch:
jobs:
  check:
    runs-on: ubuntu-latest
    timeout-minutes: 120
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
          cache: pip
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install "quantkit[eval,report]"
      - run: quantkit report --check {check} --output quantkit-report
      - if: always()
        run: test ! -f quantkit-report/report.md || cat quantkit-report/report.md >> "$GITHUB_STEP_SUMMARY"
      - if: always()
        uses: actions/upload-artifact@v4
        with:
          name: quantkit-report
          path: |
            quantkit-report/report.*
"""


def write_check(source: str, recipes: tuple[str, ...], formats: tuple[str, ...], suite: str, folder: Path, *, overwrite: bool) -> tuple[Path, Path]:
    """The check file and the workflow, neither of which may be there already.

    Args:
        recipes, formats: every recipe in every one of these containers.

    Raises:
        UsageError, RecipeError: there is no such recipe, container or suite. OutputError: a file is there.
    """
    for recipe in recipes:
        Recipe.load(recipe)
    for name in formats:
        get_format(name)
    Suite.load(suite)
    if not recipes or not formats:
        raise UsageError("name at least one recipe and one container")
    if not source.isprintable():
        raise UsageError(f"{source!r} cannot be written into a workflow; give the name of a folder or of a model on the hub")
    checkpoints = [
        ExpectedCheckpoint(name=_name(recipe, "" if name == formats[0] else name), recipe=recipe, format=name, num_samples=256)
        for recipe in dict.fromkeys(recipes)
        for name in dict.fromkeys(formats)
    ]
    check, workflow = folder / "quantkit-check.json", folder / ".github" / "workflows" / "quantkit.yml"
    for path in (check, workflow):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} is there already; --overwrite replaces it")
    CheckFile(source=source, suite=suite, checkpoints=checkpoints).write(check)
    write_text(workflow, _WORKFLOW.format(source=source, check=check.name))
    return check, workflow


def _name(recipe: str, container: str) -> str:
    """Of a checkpoint's folder: the recipe's own name, or its file's."""
    base = re.sub(r"[^\w.+-]", "-", Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe)
    return f"{base}-{container}" if container else base
