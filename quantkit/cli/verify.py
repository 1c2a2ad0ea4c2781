"""`quantkit verify`: is a checkpoint whole, consistent, and what its original became?"""

from __future__ import annotations

import click


@click.command()
@click.argument("out")
@click.option("--against", metavar="SRC", help="The original: adds layer errors, equality of what was not quantized, and KL divergence.")
@click.option("--tokens", "num_tokens", type=int, default=4096, show_default=True, help="Tokens for the KL divergence.")
@click.option("--text", help="What the tokens are of: a file, folder or data set.  [default: what the built-in mix never calibrates on]")
@click.option("--no-kl", is_flag=True, help="Leave the KL divergence out.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along.")
def verify(
    out: str, against: str | None, num_tokens: int, text: str | None, no_kl: bool, device: str, as_json: bool, trust_remote_code: bool
) -> int:
    """Check the checkpoint OUT; with --against, compare it with its original too. Ends with 1 if a check fails.

    \b
    quantkit verify out --against org/name
    quantkit verify org/name-gptq              # made by any tool
    """
    import json

    from quantkit.cli.block_progress import block_progress
    from quantkit.cli.tables import plain_table, results_console
    from quantkit.conversion.verify import VerifyOptions
    from quantkit.conversion.verify import verify as run

    options = VerifyOptions(num_tokens=0 if no_kl else num_tokens, text=text, device=device, trust_remote_code=trust_remote_code)
    with block_progress() as progress:
        result = run(out, against=against, options=options, progress=progress)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
        return 0 if result.ok else 1
    table = plain_table("", "check", "")
    for check in result.checks:
        table.add_row("ok" if check.ok else "FAILED", check.name, check.detail)
    results_console().print(table)
    num_failed = sum(not check.ok for check in result.checks)
    click.echo(f"{out}: {f'{num_failed} of {len(result.checks)} checks failed' if num_failed else f'all {len(result.checks)} checks passed'}")
    return 0 if result.ok else 1
