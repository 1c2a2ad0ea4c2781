"""The whole of `quantkit convert`: refuse, prepare, work, finish."""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.ledger import Ledger
from quantkit.checkpoint.output import finish, prepare, release
from quantkit.checkpoint.side_files import side_files
from quantkit.checkpoint.writer import CheckpointWriter, require_space
from quantkit.conversion.allocate import account, choose_schemes, measurement_path, tightened, tried, write_allocation
from quantkit.conversion.allocation_file import path_beside
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.foldable import require_places
from quantkit.conversion.hidden_states import spilled_bytes
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.outcome import CARD_FILE, make_report, write_side_files
from quantkit.conversion.prepare import Prepared, check_output, plan_conversion, require_apart
from quantkit.conversion.recipe import Rule
from quantkit.conversion.report import ConversionReport, LayerResult
from quantkit.conversion.rows import load_rows, split_rows
from quantkit.conversion.without_data import round_without_data
from quantkit.conversion.work import CalibratedWork, RunModel
from quantkit.conversion.workplace import Listener, Workplace, carry
from quantkit.core.divergence import DivergenceResult
from quantkit.core.products import fast_products, product_library
from quantkit.errors import Interrupted
from quantkit.formats.streamed import FileOrder
from quantkit.models.streaming import BlockRunner


class Silent:
    """A listener that hears nothing."""

    def started(self, num_blocks: int) -> None: ...

    def layer(self, result: LayerResult) -> None: ...

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None: ...

    def stage(self, text: str) -> None: ...


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


@fast_products()
def run(prepared: Prepared, out: Path, listener: Listener) -> ConversionReport:
    """Do what was planned."""
    started = time.monotonic()
    options, plan = prepared.options, prepared.plan
    require_apart(prepared.origin.folder, out)
    require_places(prepared, _running_dtype(prepared), listener.stage)
    partial = prepare(out, overwrite=options.overwrite, fresh=options.fresh)
    try:
        require_space(partial, plan.bytes_after)
        side_files(prepared.origin.folder, exclude=(CARD_FILE,))
        rows = load_rows(prepared) if plan.needs_calibration or prepared.needs_measurement else None
        if prepared.needs_measurement:
            assert rows is not None
            prepared = choose_schemes(prepared, rows, out, partial, _running_dtype(prepared), listener.stage)
        results, divergence = _attempt(prepared, rows, partial, listener)
        prepared = tried(prepared, divergence)
        while (following := tightened(prepared, divergence)) is not None:
            release(partial)
            partial = prepare(out, overwrite=options.overwrite, fresh=True)
            assert following.allocation is not None and following.allocation.measurement is not None
            following.allocation.measurement.write(measurement_path(prepared, out))
            results, divergence = _attempt(following, rows, partial, listener)
            prepared = tried(following, divergence)
        outcome = account(prepared, divergence)
        prepared.plan.notes.extend(write_allocation(prepared, outcome, partial, out))
        report = make_report(prepared, out, results, divergence, rows, time.monotonic() - started, outcome)
        write_side_files(prepared, partial, report)
        finish(partial, out, overwrite=options.overwrite)
        path_beside(out).unlink(missing_ok=True)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; what is finished is kept in {partial}, and the same command goes on from there") from error
    finally:
        release(partial)
    return report


def _attempt(
    prepared: Prepared, rows: CalibrationSet | None, partial: Path, listener: Listener
) -> tuple[list[LayerResult], DivergenceResult | None]:
    """Make every tensor of the plan; rows are for plans that calibrate."""
    options, plan = prepared.options, prepared.plan
    rows = rows if plan.needs_calibration else None
    require_space(partial, plan.bytes_after + (0 if rows is None else _spilled_bytes(prepared, rows)))
    ledger = Ledger.open(partial, _identity(prepared, rows), fresh=options.fresh)
    with CheckpointWriter(partial, plan.tensors, max_shard_size=options.max_shard_size) as writer:
        writer.mark_done(name for unit in ledger.units for name in ledger.entry(unit)["tensors"])
        place = Workplace(prepared.weights, plan, writer, ledger, listener, prepared.model_dtype, prepared.device)
        results, divergence = _work(prepared, place, rows, partial)
        writer.close()
    return results, divergence


def _identity(prepared: Prepared, rows: CalibrationSet | None) -> dict[str, Any]:
    """What the output depends on, under names that say what changed when a run is not gone on with."""
    options, calibration = prepared.options, prepared.options.calibration
    recipe = prepared.recipe
    made_by = {"recipe": None} if recipe is None else {
        "recipe": recipe.name, **{f"rule {i}": _in_words(rule) for i, rule in enumerate(recipe.rules, 1)}, "fallback": recipe.fallback,
    }  # fmt: skip
    data = {} if rows is None else {
        "calibration data": rows.report.source, "num_samples": calibration.num_samples, "seq_len": rows.report.seq_len, "seed": calibration.seed,
        "layout": calibration.layout, "calibration rows": rows.fingerprint,
    }  # fmt: skip
    names = " ".join(f"{name}={layer.scheme.name}" for name, layer in prepared.plan.layers.items())
    cache = {} if prepared.plan.kv_cache is None else {"KV cache": prepared.plan.kv_cache.name}
    rotated = {} if recipe is None or recipe.rotation is None else {"rotation": recipe.rotation.model_dump()}
    chosen = {} if prepared.allocation is None else {"allocated schemes": hashlib.sha256(names.encode()).hexdigest()[:16]}
    return {
        "source fingerprint": prepared.source.reader.fingerprint(), **made_by,
        "format": options.container, "requantize": options.requantize,
        "dtype": options.dtype, "max_shard_size": options.max_shard_size, "measure": options.measure, **data, **chosen, **cache, **rotated,
        "experts calibrated on": "all tokens" if prepared.plan.calibrates_all_experts else "their own",
        "device": _device_name(prepared.device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": version("transformers"), "quantkit": version("quantkit"),
    }  # fmt: skip


def _in_words(rule: Rule) -> str:
    return f"{rule.pattern}: {rule.scheme} by {rule.rounding}" + (f" after {', '.join(map(str, rule.transforms))}" if rule.transforms else "")


def _device_name(device: torch.device) -> str:
    """What sums are rounded by: the kind of GPU, or the instructions this CPU's kernels were chosen for and whose they are."""
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}, products by {product_library()}"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def _work(prepared: Prepared, place: Workplace, rows: CalibrationSet | None, partial: Path) -> tuple[list[LayerResult], DivergenceResult | None]:
    blocks = prepared.architecture.blocks
    place.listener.started(len(blocks))
    decoded = carry(place)
    if rows is None:
        return [*([] if prepared.recipe else decoded), *round_without_data(place, blocks)], None
    calibration, held_out = split_rows(rows, prepared.options)
    runner = BlockRunner(prepared.architecture, device=place.device, dtype=_running_dtype(prepared))
    if prepared.rotation is None:
        return CalibratedWork(place, runner, calibration, held_out, partial).run()
    original = prepared.rotation.original
    as_it_was = RunModel(BlockRunner(original, device=place.device, dtype=runner.dtype), FileOrder(prepared.source, original))
    return CalibratedWork(place, runner, calibration, held_out, partial, as_it_was).run()


def _running_dtype(prepared: Prepared) -> torch.dtype:
    return torch.float32 if prepared.device.type == "cpu" else prepared.model_dtype


def _spilled_bytes(prepared: Prepared, rows: CalibrationSet) -> int:
    """What hidden states take on the disk: those that calibrate once, or twice where the original model runs too, those held out twice."""
    calibration, held_out = split_rows(rows, prepared.options)
    width, dtype = prepared.architecture.config.get_text_config().hidden_size, _running_dtype(prepared)
    kept = [*([calibration] * (2 if prepared.plan.needs_original else 1)), *([held_out] * 2 if held_out else [])]
    return sum(spilled_bytes(part.input_ids.numel(), width, dtype) for part in kept)
