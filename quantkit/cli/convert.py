"""`quantkit convert`: options in, progress on stderr, the account of what was written on stdout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from quantkit.errors import UsageError
from quantkit.given import size_in_bytes

if TYPE_CHECKING:
    from quantkit.conversion.options import ConvertOptions


class Size(click.ParamType):
    """Bytes with a unit, as 5GB or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return size_in_bytes(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


CONTAINERS = "compressed-tensors, gptq, gptq-v2, awq, fp8, bitsandbytes, bf16"
ENGINES = "vLLM, SGLang, transformers, TGI, llama.cpp, GPTQModel, quantkit"
"""Both written down, as their code loads torch."""


@click.command()
@click.argument("source")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder to write; it must not exist.")
@click.option("-r", "--recipe", show_default="w4a16-gptq", help="A shipped recipe (see `quantkit recipes`) or a YAML file.")
@click.option("-f", "--format", "format_name", show_default="recipe's or compressed-tensors", help=f"Container: {CONTAINERS} (ordinary weights).")
@click.option("--target-engine", "target_engines", multiple=True, metavar="ENGINE", help=f"Refuse what it would not load: {ENGINES}. Repeatable.")
@click.option("--calib", metavar="DATA", help="Text, JSON(L), CSV or parquet file or folder, data set's name, or token file. Default: built-in mix.")
@click.option("--text-column", help="Column of the calibration data that holds the text or the conversation.")
@click.option("--prompt-column", help="With --response-column: two columns that make one exchange.")
@click.option("--response-column", help="See --prompt-column.")
@click.option("--calib-layout", default="pack", show_default=True, type=click.Choice(["pack", "pad"]), help="Documents end to end, or one a row.")
@click.option("--num-samples", default=256, show_default=True, type=click.IntRange(1), help="Calibration rows.")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens a row. Default: 2048, or the model's context if that is less.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", show_default=True, help="Type of unquantized tensors: auto (as they are), bfloat16, float16, float32.")
@click.option("--override", multiple=True, metavar="REGEX=SCHEME", help="Scheme of layers whose name matches, e.g. 'down_proj=w8a16'. Repeatable.")
@click.option("--ignore", multiple=True, metavar="REGEX", help="Layers to leave as they are. Repeatable.")
@click.option("--group-size", type=int, help="Weights that share a scale; -1 for one scale a channel. It must divide every layer it applies to.")
@click.option("--target-bpw", metavar="BITS", help="Choose layers' bits by measurement, for 4.25 bits a weight in them, or file:4.5 over all.")
@click.option("--max-kl", type=float, metavar="NATS", help="The same with the fewest bits whose KL divergence is at most this, such as 0.02.")
@click.option("--allocation", metavar="FILE", help="What an earlier run measured: a file, or its output. A new name is written.")
@click.option("--kv-cache", metavar="NAME", help="Calibrate scales for a KV cache: fp8 (one a tensor), fp8-head (one a head). Or none.")
@click.option("--rotation", metavar="NAME", help="Fold a rotation of the hidden states into all weights first: hadamard. Or none.")
@click.option("--moe-calibrate-all-experts/--moe-calibrate-routed", default=None, help="Every token to every expert. Default: the recipe's.")
@click.option("--max-shard-size", default="5GB", show_default=True, type=Size(), help="Largest weight file.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace the model at OUT once the new one is whole.")
@click.option("--fresh", is_flag=True, help="Discard what an unfinished run left instead of going on with it.")
@click.option("--requantize", is_flag=True, help="Quantize a quantized SOURCE's decoded weights; with --format alone, only layers it cannot hold.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Perplexity and KL on held-out calibration rows (calibrated recipes).")
@click.option("--seed", default=0, show_default=True, help="Which calibration documents come first.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model. Off by default for good reason.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, or a dry run's plan, as JSON.")
def convert(source: str, out: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Quantize SOURCE and write it to a new folder.

    SOURCE is a Hugging Face folder, a hub id (org/name), modelscope:org/name, or `reference`, the small model that ships with quantkit.

    A SOURCE that is quantized already goes into another container as it is when --format is all that is said, and layer by layer it is checked that
    nothing changed; --format bf16 makes ordinary weights of it again.

    A run that was stopped or killed goes on where it was when the same command is given again.

    \b
    quantkit convert reference -o out
    quantkit convert org/name -o out -r w4a16-gptq -f gptq --calib chats.jsonl
    quantkit convert org/name -o out --target-bpw 4.25
    quantkit convert org/name-GPTQ -o out -f compressed-tensors --target-engine vllm
    quantkit convert ./model -o out -r w4a16-mse --override 'down_proj=w8a16' --ignore 'layers\\.0\\.'
    """
    from pathlib import Path

    from quantkit.cli.plan_json import plan_in_json
    from quantkit.cli.progress import ConvertProgress, console, show_plan, show_report
    from quantkit.conversion.convert import run
    from quantkit.conversion.prepare import check_output, plan_conversion

    settings = _settings(options)
    check_output(source, Path(out), settings)
    with console.status("reading headers"):
        prepared = plan_conversion(source, settings)
    if dry_run and as_json:
        click.echo(json.dumps(plan_in_json(prepared), indent=1))
        return
    if dry_run:
        show_plan(prepared)
        return
    with ConvertProgress() as progress:
        report = run(prepared, Path(out), progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        show_report(report)


def _settings(options: dict[str, Any]) -> ConvertOptions:
    from quantkit.conversion.calibration import CalibrationOptions
    from quantkit.conversion.options import ConvertOptions

    calibration = CalibrationOptions(
        source=options["calib"], num_samples=options["num_samples"], seq_len=options["seq_len"], text_column=options["text_column"],
        prompt_column=options["prompt_column"], response_column=options["response_column"], layout=options["calib_layout"], seed=options["seed"],
    )  # fmt: skip
    return ConvertOptions(
        recipe=options["recipe"], format=options["format_name"], calibration=calibration, overrides=options["override"], ignore=options["ignore"],
        group_size=options["group_size"], target_bpw=options["target_bpw"], max_kl=options["max_kl"],
        allocation=options["allocation"], kv_cache=options["kv_cache"], rotation=options["rotation"], dtype=options["dtype"],
        device=options["device"], max_shard_size=options["max_shard_size"], moe_calibrate_all_experts=options["moe_calibrate_all_experts"],
        overwrite=options["overwrite"], fresh=options["fresh"], requantize=options["requantize"], measure=options["measure"],
        target_engines=options["target_engines"], trust_remote_code=options["trust_remote_code"],
    )  # fmt: skip
