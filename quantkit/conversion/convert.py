"""The whole of `quantkit convert`: resolve, plan, refuse, prepare, work, finish. Everything that can be refused is refused before any work."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.disk import write_atomically
from quantkit.checkpoint.ledger import Ledger
from quantkit.checkpoint.output import check, copy_side_files, finish, prepare, release
from quantkit.checkpoint.side_files import side_files
from quantkit.checkpoint.source import Source, resolve
from quantkit.checkpoint.weight_files import some
from quantkit.checkpoint.writer import CheckpointWriter, require_space
from quantkit.conversion.calibration import CalibrationOptions, CalibrationSet, load_calibration
from quantkit.conversion.hidden_states import spilled_bytes
from quantkit.conversion.plan import Plan, make_plan
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.report import ConversionReport, LayerResult, model_card
from quantkit.conversion.token_file import load_token_file
from quantkit.conversion.work import CalibratedWork, Listener, Workplace, carry, round_without_data
from quantkit.core.divergence import DivergenceResult
from quantkit.errors import Interrupted, OutputError, QuantkitError, SourceError, UsageError, did_you_mean
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import get_format
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.device import find_device
from quantkit.models.streaming import BlockRunner
from quantkit.models.tokenizer import load_tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT_FILE, RECIPE_FILE, CARD_FILE = "quantkit_report.json", "recipe.yaml", "README.md"
MAX_HELD_OUT = 16


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert; every default is the recommended choice.

    Attributes:
        dtype: type of unquantized tensors in the output, "auto" to keep each.
        device: "auto" takes a GPU where there is one.
        max_shard_size: bytes of one weight file.
        requantize: take an already quantized source, decoded, as the original.
        measure: perplexity and KL on held-out calibration rows; only calibrated recipes have any.
    """

    recipe: str = "w4a16-gptq"
    format: str = "compressed-tensors"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    overrides: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False
    fresh: bool = False
    requantize: bool = False
    measure: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; {did_you_mean(self.dtype, DTYPES)}")
        if self.max_shard_size < 1:
            raise UsageError(f"max_shard_size is {self.max_shard_size}; give a size such as 5GB")
        get_format(self.format)


@dataclass(eq=False, slots=True)
class Prepared:
    """A conversion that has been planned and not refused."""

    origin: Source
    source: OpenedCheckpoint
    architecture: Architecture
    recipe: Recipe
    plan: Plan
    options: ConvertOptions
    device: torch.device


class Silent:
    """A listener that hears nothing."""

    def started(self, num_blocks: int) -> None: ...

    def layer(self, result: LayerResult) -> None: ...

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None: ...

    def stage(self, text: str) -> None: ...


def check_output(source: str, out: Path, options: ConvertOptions) -> None:
    """Refuse an output that cannot be written before anything is fetched or read; creates nothing."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        _require_apart(folder, out)
    check(out, overwrite=options.overwrite)


def plan_conversion(source: str, options: ConvertOptions) -> Prepared:
    """Read headers and decide everything; raises the error of whatever cannot be done."""
    recipe = Recipe.load(options.recipe).changed(overrides=options.overrides, ignore=options.ignore, group_size=options.group_size)
    device = find_device(options.device)
    origin = resolve(source, trust_remote_code=options.trust_remote_code)
    opened = _open(origin, options)
    config = load_config(origin.folder, trust_remote_code=options.trust_remote_code)
    architecture = describe(config, opened, trust_remote_code=options.trust_remote_code)
    _require_tensors(architecture, opened, origin)
    plan = make_plan(opened, architecture, recipe, options.format, DTYPES[options.dtype])
    return Prepared(origin, opened, architecture, recipe, plan, options, device)


def convert(source: str, out: str | Path, options: ConvertOptions | None = None, listener: Listener | None = None) -> ConversionReport:
    """Convert a model and write it to `out`; see `plan_conversion` for what is refused beforehand.

    Args:
        source: folder, hub id, `modelscope:org/name`, or `reference`.
        listener: told of progress.

    Raises:
        QuantkitError: one of its kinds, with nothing lost; an unfinished run goes on when the same call is made again.
    """
    options = options or ConvertOptions()
    check_output(source, Path(out), options)
    return run(plan_conversion(source, options), Path(out), listener or Silent())


def run(prepared: Prepared, out: Path, listener: Listener) -> ConversionReport:
    """Do what was planned."""
    started = time.monotonic()
    options, plan = prepared.options, prepared.plan
    _require_apart(prepared.origin.folder, out)
    partial = prepare(out, overwrite=options.overwrite, fresh=options.fresh)
    try:
        require_space(partial, plan.bytes_after)
        side_files(prepared.origin.folder, exclude=(CARD_FILE,))
        rows = load_rows(prepared) if plan.needs_calibration else None
        if rows is not None:
            require_space(partial, plan.bytes_after + _spilled_bytes(prepared, rows))
        ledger = Ledger.open(partial, _identity(prepared, rows), fresh=options.fresh)
        with CheckpointWriter(partial, plan.tensors, max_shard_size=options.max_shard_size) as writer:
            writer.mark_done(name for unit in ledger.units for name in ledger.entry(unit)["tensors"])
            place = Workplace(prepared.source, plan, writer, ledger, listener, DTYPES[options.dtype] or prepared.source.dtype, prepared.device)
            results, divergence = _work(prepared, place, rows, partial)
            writer.close()
        report = _report(prepared, out, results, divergence, rows, time.monotonic() - started)
        _write_side_files(prepared, partial, report)
        finish(partial, out, overwrite=options.overwrite)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; what is finished is kept in {partial}, and the same command goes on from there") from error
    finally:
        release(partial)
    return report


def load_rows(prepared: Prepared) -> CalibrationSet:
    """The calibration rows, with the rows to be held out behind them."""
    wanted = prepared.options.calibration
    extra = num_held_out(wanted.num_samples) if prepared.options.measure else 0
    more = replace(wanted, num_samples=wanted.num_samples + extra)
    if wanted.source and wanted.source.endswith(".safetensors"):
        return load_token_file(Path(wanted.source), more, prepared.architecture)
    tokenizer = load_tokenizer(prepared.origin.folder, trust_remote_code=prepared.options.trust_remote_code)
    rows = load_calibration(more, tokenizer, context=prepared.architecture.context)
    vocabulary = int(prepared.architecture.config.get_text_config().vocab_size)
    if int(rows.input_ids.max()) >= vocabulary:
        raise SourceError(
            f"the tokenizer in {prepared.origin.folder} makes token {int(rows.input_ids.max())}, and the model's vocabulary has {vocabulary}; "
            "put the model's own tokenizer files there"
        )
    return rows


def num_held_out(num_samples: int) -> int:
    """Rows to measure on beside this many to calibrate on."""
    return max(1, min(MAX_HELD_OUT, num_samples // 8))


def _open(origin: Source, options: ConvertOptions) -> OpenedCheckpoint:
    try:
        opened = OpenedCheckpoint(origin.folder)
    except QuantkitError as error:
        raise type(error)(f"{origin.name}: {error}") from error
    if opened.format is not None and not options.requantize:
        schemes = sorted({scheme.name for scheme in opened.schemes.values()})
        raise SourceError(
            f"{origin.name} is already quantized: {opened.format.name}, {len(opened.schemes)} layers of {', '.join(schemes)}. "
            "Convert the original model, or pass --requantize to take the decoded weights as they are"
        )
    return opened


def _require_apart(source: Path, out: Path) -> None:
    """What is read is never replaced."""
    folder, target = source.resolve(), out.expanduser().resolve()
    if target == folder or target in folder.parents:
        raise OutputError(f"{out} {'is' if target == folder else 'holds'} the source model; choose another output")


def _require_tensors(architecture: Architecture, opened: OpenedCheckpoint, origin: Source) -> None:
    """Every parameter of the model is in the checkpoint, in the shape its config says; a tied head need not be."""
    is_tied = bool(getattr(architecture.config.get_text_config(), "tie_word_embeddings", False))
    outside = {f"{linear.path}.weight" for linear in architecture.outside}
    absent = []
    for path, parameter in architecture.model.named_parameters():
        name = architecture.find(path, opened)
        if name is None:
            absent += [] if is_tied and path in outside else [path]
        elif name in opened.reader and (stored := opened.reader.info(name).shape) != tuple(parameter.shape):
            wanted = list(parameter.shape)
            raise SourceError(f"{origin.name}: {name} is {list(stored)} where config.json asks for {wanted}; the two belong to different models")
    if absent:
        raise SourceError(f"{origin.name} lacks {len(absent)} tensors its config promises: {some(absent, 3)}; fetch the model again")


def _identity(prepared: Prepared, rows: CalibrationSet | None) -> dict[str, Any]:
    """What the output depends on, under names that say what changed when a run is not gone on with."""
    options, calibration = prepared.options, prepared.options.calibration
    rules = {f"rule {i}": f"{rule.pattern}: {rule.scheme} by {rule.rounding}" for i, rule in enumerate(prepared.recipe.rules, 1)}
    data = {} if rows is None else {
        "calibration data": rows.report.source, "num_samples": calibration.num_samples, "seq_len": rows.report.seq_len, "seed": calibration.seed,
        "layout": calibration.layout, "calibration rows": rows.fingerprint,
    }  # fmt: skip
    return {
        "source fingerprint": prepared.source.reader.fingerprint(), "recipe": prepared.recipe.name, **rules, "fallback": prepared.recipe.fallback,
        "format": options.format, "dtype": options.dtype, "max_shard_size": options.max_shard_size, "measure": options.measure, **data,
        "device": _device_name(prepared.device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": version("transformers"), "quantkit": version("quantkit"),
    }  # fmt: skip


def _device_name(device: torch.device) -> str:
    """What sums are rounded by: the kind of GPU, or the instructions this CPU's kernels were chosen for."""
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def _work(prepared: Prepared, place: Workplace, rows: CalibrationSet | None, partial: Path) -> tuple[list[LayerResult], DivergenceResult | None]:
    blocks = prepared.architecture.blocks
    place.listener.started(len(blocks))
    carry(place)
    if rows is None:
        return round_without_data(place, blocks), None
    calibration, held_out = _split(rows, prepared.options)
    runner = BlockRunner(prepared.architecture, device=place.device, dtype=_running_dtype(prepared))
    return CalibratedWork(place, runner, calibration, held_out, partial).run()


def _running_dtype(prepared: Prepared) -> torch.dtype:
    return torch.float32 if prepared.device.type == "cpu" else DTYPES[prepared.options.dtype] or prepared.source.dtype


def _spilled_bytes(prepared: Prepared, rows: CalibrationSet) -> int:
    """What hidden states take on the disk: those that calibrate once, those held out twice."""
    calibration, held_out = _split(rows, prepared.options)
    width, dtype = prepared.architecture.config.get_text_config().hidden_size, _running_dtype(prepared)
    kept = [calibration, *([held_out] * 2 if held_out else [])]
    return sum(spilled_bytes(part.input_ids.numel(), width, dtype) for part in kept)


def _split(rows: CalibrationSet, options: ConvertOptions) -> tuple[CalibrationSet, CalibrationSet | None]:
    extra = num_held_out(options.calibration.num_samples)
    held = min(extra, max(0, len(rows.input_ids) - min(options.calibration.num_samples, max(1, len(rows.input_ids) - extra))))
    return rows.split(held) if options.measure and held else (rows, None)


def _account(rows: CalibrationSet, options: ConvertOptions) -> str:
    calibration, held_out = _split(rows, options)
    return calibration.report.summary() + (f"; {len(held_out.input_ids)} more rows held out to measure on" if held_out else "")


def _report(
    prepared: Prepared, out: Path, results: list[LayerResult], divergence: DivergenceResult | None, rows: CalibrationSet | None, seconds: float
) -> ConversionReport:
    plan = prepared.plan
    return ConversionReport(
        source=prepared.origin.name, output=str(out), recipe=prepared.recipe.name, format=plan.format.name, layers=results,
        left_alone=plan.left_alone, bytes_before=plan.bytes_before, bytes_after=plan.bytes_after, linear_bpw=plan.linear_bpw,
        file_bpw=plan.file_bpw, seconds=seconds, peak_memory_bytes=peak_memory(),
        calibration=_account(rows, prepared.options) if rows else None, divergence=divergence.to_dict() if divergence else None,
        versions={name: version(name) for name in ("quantkit", "torch", "transformers")}, notes=list(plan.notes),
    )  # fmt: skip


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write_side_files(prepared: Prepared, partial: Path, report: ConversionReport) -> None:
    """Everything beside the weights; config.json, which makes the folder a model, comes last."""
    copy_side_files(prepared.origin.folder, partial, exclude=(CARD_FILE, REPORT_FILE, RECIPE_FILE))
    layers = {name: layer.scheme for name, layer in prepared.plan.layers.items()}
    config = {k: v for k, v in prepared.source.reader.config.items() if k not in ("quantization_config", "compression_config")}
    if prepared.options.dtype != "auto":
        config |= {"dtype": prepared.options.dtype} | ({"torch_dtype": prepared.options.dtype} if "torch_dtype" in config else {})
    config["quantization_config"] = prepared.plan.format.config(layers, prepared.plan.ignored)
    _write_text(partial / RECIPE_FILE, prepared.recipe.to_yaml())
    _write_text(partial / CARD_FILE, model_card(report, prepared.origin.name))
    _write_text(partial / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    if config["quantization_config"]["quant_method"] == "gptq":
        _write_text(partial / "quantize_config.json", json.dumps(config["quantization_config"], indent=2) + "\n")
    _write_text(partial / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
