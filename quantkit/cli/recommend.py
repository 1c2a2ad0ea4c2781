"""`quantkit recommend`: which recipe and container to take for a model, a machine and an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from quantkit.errors import UsageError

if TYPE_CHECKING:
    import torch

    from quantkit.report.advice import Advice, Needs

_SHARE = 0.8
_SHOWN = 6


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from quantkit.given import size_in_bytes

    return None if value is None else size_in_bytes(value)


@click.command()
@click.argument("source")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--engine", help="The engine that is to load it, as `quantkit inspect` names it: vLLM, llama.cpp, ...  [default: any]")
@click.option("--memory", metavar="SIZE", callback=_bytes, help="For weights and KV cache, as 8GB.  [default: 80% of what the device has free]")
@click.option("--batch", type=click.Choice(["1", "many"]), default="1", show_default=True, help="One request at a time, or many.")
@click.option("--context", type=click.IntRange(1), help="Tokens that a request may hold.  [default: 4096, or the model's own if that is less]")
@click.option("--all", "shows_all", is_flag=True, help="Show every choice, and why those at the end are there.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along.")
def recommend(
    source: str, device: str, engine: str | None, memory: int | None, batch: str, context: int | None, shows_all: bool, as_json: bool,
    trust_remote_code: bool,
) -> None:  # fmt: skip
    """Say how to quantize the unquantized model SOURCE: predicted size, KV room, speed limit and loss of every recipe and container.

    Only headers are read. The limit of tokens a second comes from how fast this machine reads memory, measured in a second, and holds for one
    request; losses are those of the model that ships with quantkit, and say how recipes compare.

    \b
    quantkit recommend org/name --engine vLLM
    quantkit recommend ./model --memory 8GB --batch many
    """
    import json
    from dataclasses import asdict

    from quantkit.checkpoint.source import resolve
    from quantkit.models.architecture import load_config
    from quantkit.models.device import find_device
    from quantkit.report.advice import Needs, advise

    place = find_device(device)
    folder = resolve(source, trust_remote_code=trust_remote_code).folder
    config = load_config(folder, trust_remote_code=trust_remote_code)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096)
    if context is not None and context > longest:
        raise UsageError(f"--context {context} is more than the {longest} of the model")
    free = _free(place) if memory is None else memory
    unmeasured = Needs(memory=free, bandwidth=0.0, batch=batch, context=context or min(4096, longest), engine=engine)
    from dataclasses import replace

    from quantkit.bench.bandwidth import read_bandwidth

    needs = replace(unmeasured, bandwidth=read_bandwidth(place))
    found = advise(source, needs, trust_remote_code=trust_remote_code)
    if as_json:
        rows = [asdict(each) | {"command": each.command(source)} for each in found]
        click.echo(json.dumps({"source": source, "device": str(place), "needs": asdict(needs), "choices": rows}, indent=1))
        return
    click.echo(f"{_machine(place)}; {free / 1e9:.1f} GB for weights and KV cache, read at {needs.bandwidth / 1e9:.0f} GB/s", err=True)
    _show(found, needs, source, shows_all=shows_all)


def _show(found: list[Advice], needs: Needs, source: str, *, shows_all: bool) -> None:
    from quantkit.cli.tables import plain_table, results_console
    from quantkit.report.words import size

    good = [each for each in found if each.why_not is None]
    shown = found if shows_all else good[:_SHOWN] or found[:_SHOWN]
    number = ("size", "KV room, tokens", "tokens/s at most", "loss (KL)")
    table = plain_table("", "recipe", "container", *number, "loads in", *(["but"] if shows_all or not good else []), right=number)
    for place, each in enumerate(shown, 1):
        table.add_row(
            str(place), each.recipe or "as it is", each.container or "", size(each.file_bytes), f"{max(0, each.kv_tokens):,}", f"{each.limit:,.0f}",
            "" if each.loss is None else f"{each.loss:.4f}", ", ".join(each.engines), *([each.why_not or ""] if shows_all or not good else []),
        )  # fmt: skip
    console = results_console()
    console.print(table)
    console.print()
    if not good:
        console.print("Nothing fits all that is asked for: give more --memory, a smaller --context, or another --engine.")
        return
    command = good[0].command(source)
    console.print(f"{command}" if command else "The model as it is fits, and nothing that is smaller reads less.")


def _free(device: torch.device) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * psutil.virtual_memory().available)


def _machine(device: torch.device) -> str:
    """The processor with what of it matters, or the GPU."""
    import torch

    from quantkit.evaluation.results import machine

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    checks = {"AVX2": "_is_avx2_supported", "AVX-512": "_is_avx512_supported", "VNNI": "_is_vnni_supported",
              "BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}  # fmt: skip
    sets = [name for name, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]
    return f"{machine().processor}, {torch.get_num_threads()} threads, {', '.join(sets) or 'no vector instructions known'}"
