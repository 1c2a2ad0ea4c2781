"""`quantkit bench`: measurements that anyone can repeat."""

from __future__ import annotations

import click


@click.group()
def bench() -> None:
    """Measure what quantkit takes on this machine."""


@bench.command()
@click.option("--only", help="Cases whose name contains this.")
@click.option("--work", type=click.Path(exists=True, file_okay=False), help="Folder for models and outputs (2.6 GB for the largest case).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def convert(only: str | None, work: str | None, as_json: bool) -> None:
    """Time and memory of converting random models: one of 2 GB without data, and calibrated ones of two depths."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from quantkit.bench.convert import CASES, machine, measure
    from quantkit.errors import UsageError

    cases = tuple(case for case in CASES if only is None or only in case.name)
    if not cases:
        raise UsageError(f"no case contains {only!r}; cases are {', '.join(case.name for case in CASES)}")
    click.echo(f"machine: {machine()}", err=True)
    if not as_json:
        click.echo("| case | recipe | model | private memory | resident | wall | processor |\n|---|---|---|---|---|---|---|")
    for result in measure(cases, Path(work) if work else None):
        usage = result.usage
        if as_json:
            click.echo(json.dumps(asdict(result)))
        else:
            click.echo(
                f"| {result.case.name} | {result.case.recipe} | {result.source_bytes / 1e6:,.0f} MB | {usage.peak_private / 1e6:,.0f} MB "
                f"| {usage.peak_resident / 1e6:,.0f} MB | {usage.seconds:.0f} s | {usage.cpu_seconds:.0f} s |"
            )


@bench.command()
@click.option("--only", help="Cases whose name contains this.")
@click.option("--work", type=click.Path(exists=True, file_okay=False), help="Folder for models (1.5 GB).")
def load(only: str | None, work: str | None) -> None:
    """Memory of loading a random model of 0.9 GB, and of its conversions."""
    from pathlib import Path

    from quantkit.bench.convert import machine
    from quantkit.bench.load import CASES, KV_BYTES, measure
    from quantkit.errors import UsageError

    cases = tuple(case for case in CASES if only is None or only in case.name)
    if not cases:
        raise UsageError(f"no case contains {only!r}; cases are {', '.join(case.name for case in CASES)}")
    click.echo(f"machine: {machine()}; a cache of {KV_BYTES / 1e6:,.0f} MB", err=True)
    click.echo("| case | packed model | private memory | of it imports | peak over model and cache | wall |\n|---|---|---|---|---|---|")
    for result in measure(cases, Path(work) if work else None):
        click.echo(
            f"| {result.case.name} | {result.packed_bytes / 1e6:,.0f} MB | {result.usage.peak_private / 1e6:,.0f} MB "
            f"| {result.import_bytes / 1e6:,.0f} MB | {result.ratio:.2f} | {result.usage.seconds:.0f} s |"
        )
