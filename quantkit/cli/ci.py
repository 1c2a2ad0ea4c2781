"""`quantkit ci`: the check of `quantkit report` for a model of one's own, in GitHub Actions."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def ci() -> None:
    """Hold a model's quantizations to what they were, in CI."""


@ci.command()
@click.argument("source")
@click.option("--recipe", "-r", "recipes", multiple=True, default=("w4a16-gptq",), show_default=True, help="May be repeated.")
@click.option("--format", "-f", "formats", multiple=True, default=("compressed-tensors",), show_default=True, help="May be repeated.")
@click.option("--suite", default="quick", show_default=True, help="Tasks to answer: quick, standard, full, or a YAML file.")
@click.option("--output", "-o", "folder", type=click.Path(path_type=Path, file_okay=False), default=".", help="The repository.  [default: here]")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def init(source: str, recipes: tuple[str, ...], formats: tuple[str, ...], suite: str, folder: Path, overwrite: bool) -> None:
    """Write quantkit-check.json and a GitHub Actions workflow for the model SOURCE (a folder of the repository, or a hub id).

    \b
    quantkit ci init org/name -r w4a16-gptq -r w8a8-int8
    quantkit report --check quantkit-check.json --update     # measures what is to be kept
    git add quantkit-check.json .github
    """
    from quantkit.report.workflow import write_check

    check, workflow = write_check(source, recipes, formats, suite, folder, overwrite=overwrite)
    click.echo(f"written: {check}, {workflow}")
    click.echo(f"next: quantkit report --check {check} --update, and commit both")
