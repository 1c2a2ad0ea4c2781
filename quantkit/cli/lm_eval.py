"""`quantkit lm-eval`: lm-eval's own command line on quantkit's runtime."""

from __future__ import annotations

import click

from quantkit.errors import UsageError


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Hand ARGUMENTS to lm-eval, with quantkit's runtime as its model `quantkit`, which is taken where no other --model is named.

    \b
    quantkit lm-eval run --model_args pretrained=out,mode=exact --tasks arc_easy --limit 100
    quantkit lm-eval ls tasks
    quantkit lm-eval run --help

    Model arguments: pretrained (a folder of any container, a hub id, or reference), max_length, and the engine's options, such as mode,
    kv_cache_dtype, quantization, context.
    """
    try:
        from quantkit.evaluation.harness import run
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UsageError("quantkit lm-eval needs lm-eval: pip install 'quantkit[eval]'") from error
    run(list(arguments))
