"""`quantkit eval`: what a quantized model lost against its original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.eval_tasks import run_tasks, task_options
from quantkit.errors import UsageError

_METRICS = ("ppl", "kl", "top1", "position")
_ON_REQUEST = ("greedy",)
_MANY_TOKENS = 50_000
_OF_METRICS = ("metrics", "text", "tokens", "seq_len", "max_tokens", "batch_size", "dtype")


def _metrics(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    from quantkit.errors import did_you_mean

    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if name not in _METRICS + _ON_REQUEST:
            raise UsageError(f"unknown metric {name!r}; {did_you_mean(name, _METRICS + _ON_REQUEST)}")
    return names or None


@click.command("eval")
@click.argument("model")
@click.option("--baseline", metavar="SRC", help="The original: adds KL divergence and agreement on the same tokens.")
@click.option("--metrics", callback=_metrics, metavar="LIST", help="Of ppl, kl, top1, position, greedy (how long texts of both models stay the same),"
              " separated by commas.  [default: all but greedy]")
@click.option("--text", type=click.Path(path_type=Path), help="A text file, or .jsonl with a `text` a line.  [default: prose of the reference model]")
@click.option("--tokens", type=click.Path(path_type=Path), help="A safetensors file with input_ids [rows, T], instead of a text.")
@click.option("--seq-len", type=int, help="Tokens a row, BOS included.  [default: 512, or the model's context if that is less]")
@click.option("--max-tokens", type=int, default=65_536, show_default=True, help="Tokens to count; 0 for the whole text.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows that pass through a block at once.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="float32", show_default=True, help="Type in which blocks are computed: float32, bfloat16, float16.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that was measured as one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along.")
@task_options
@click.pass_context
def evaluate(
    ctx: click.Context, model: str, baseline: str | None, metrics: tuple[str, ...] | None, text: Path | None, tokens: Path | None,
    seq_len: int | None, max_tokens: int, batch_size: int, device: str, dtype: str, as_json: bool, trust_remote_code: bool, tasks: str | None,
    suite: str | None, **options: Any,
) -> None:  # fmt: skip
    """Measure perplexity of MODEL and, with --baseline, what quantization changed.

    Both models pass over the same rows block by block, so neither has to fit into memory. Statistics bear the names and have the meanings of
    `llama-perplexity --kl-divergence`, except that every token of a row but its first is counted.

    With --tasks or --suite, lm-eval's tasks are answered instead, by one model after the other on quantkit's own runtime, and compared document by
    document. `reference_mmlu` and `reference_gsm8k` ship with quantkit; `mmlu` and `gsm8k` run on local files with --data-dir; any other name that
    lm-eval knows is fetched from the hub. Answers are kept, so that a stopped run goes on when the same command is given again.

    \b
    quantkit eval out --baseline org/name --text wiki.test.raw
    quantkit eval out --metrics ppl --tokens heldout.safetensors --json
    quantkit eval out --baseline org/name --tasks mmlu,gsm8k --num-fewshot 5 --data-dir ./data
    quantkit eval out --baseline reference --suite quick --output scores.json
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    if tasks is not None or suite is not None:
        _refuse(ctx, given & set(_OF_METRICS), "measures text, and --tasks or --suite answers tasks; leave one of them out")
        run_tasks(model, baseline, tasks, suite, as_json, options | {"device": device, "trust_remote_code": trust_remote_code})
        return
    kept = {name: options.pop(name) for name in ("cache_dir", "is_fresh")}
    _refuse(ctx, given & set(options), "is about tasks; name them with --tasks or --suite")
    if baseline is None and metrics is not None and set(metrics) - {"ppl"}:
        raise UsageError(f"{', '.join(m for m in metrics if m != 'ppl')} compare with the original model; name it with --baseline")
    settings = {
        "text": text, "tokens": tokens, "seq_len": seq_len, "max_tokens": max_tokens or None, "batch_size": batch_size, "device": device,
        "dtype": dtype, "trust_remote_code": trust_remote_code, "with_continuations": "greedy" in (metrics or ()), **kept,
    }  # fmt: skip
    _run(model, baseline, metrics or _METRICS, as_json, settings)


def _refuse(ctx: click.Context, names: set[str], why: str) -> None:
    """The first of these options, in the order of the help, is not for what was asked."""
    for option in ctx.command.params:
        if option.name in names:
            raise UsageError(f"{option.opts[0]} {why}")


def _run(model: str, baseline: str | None, metrics: tuple[str, ...], as_json: bool, settings: dict) -> None:
    import json

    from quantkit.cli.block_progress import block_progress
    from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
    from quantkit.evaluation.report import continuation_lines, divergence_lines, perplexity_lines

    with block_progress() as progress:
        report = evaluate(model, baseline=baseline, options=EvaluationOptions(**settings), progress=progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    result = report.divergence or report.perplexity
    assert result is not None
    click.echo(f"{report.num_rows} rows of {report.seq_len} tokens of {report.measured_on}; {result.num_tokens} tokens counted\n")
    lines = divergence_lines(report.divergence, metrics) if report.divergence else perplexity_lines(report.perplexity)
    if "kl" in metrics and report.divergence and result.num_tokens < _MANY_TOKENS:
        click.echo(f"the 99.9% rest on {result.num_tokens // 1000} tokens; measure {_MANY_TOKENS:,} or more to rely on them", err=True)
    lines += continuation_lines(report.continuations) if report.continuations else []
    click.echo("\n".join(lines))
