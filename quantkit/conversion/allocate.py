"""The part of a conversion that chooses schemes: measure once, choose, and choose again where a measured KL is above the one asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.conversion.allocation_file import ALLOCATION_FILE, PICTURE_FILE, Measurement, Trial, allocation_path, path_beside
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.pareto import draw_pareto
from quantkit.conversion.prepare import Prepared, allocated
from quantkit.conversion.rows import split_rows
from quantkit.conversion.sensitivity import MEASURED_TOKENS, SensitivityPass
from quantkit.core.divergence import DivergenceResult
from quantkit.errors import UsageError
from quantkit.models.streaming import BlockRunner


def choose_schemes(prepared: Prepared, rows: CalibrationSet, out: Path, folder: Path, dtype: torch.dtype, stage: Callable[[str], None]) -> Prepared:
    """The conversion with its schemes chosen, measuring first where no earlier run of the same kind has.

    Args:
        folder: where hidden states may be spilled.
        dtype: in which blocks are run.
    """
    assert prepared.allocation is not None
    path = measurement_path(prepared, out)
    part = _measured_rows(split_rows(rows, prepared.options)[0])
    made_by = _made_by(prepared, part)
    found = None if prepared.options.fresh else _kept(prepared, path, made_by)
    if found is None:
        found = _measure(prepared, part, made_by, folder, dtype, stage)
        found.write(path)
    return allocated(prepared, found)


def measurement_path(prepared: Prepared, out: Path) -> Path:
    """Where the measurement is kept while the work goes on."""
    given = prepared.options.allocation
    return path_beside(out) if given is None else allocation_path(given)


def _measured_rows(rows: CalibrationSet) -> CalibrationSet:
    count = max(1, min(len(rows.input_ids), MEASURED_TOKENS // rows.input_ids.shape[1]))
    return rows if count == len(rows.input_ids) else rows.split(len(rows.input_ids) - count)[0]


def _made_by(prepared: Prepared, rows: CalibrationSet) -> dict[str, Any]:
    return {
        "rows": rows.fingerprint, "roundings": list(prepared.plan.roundings),
        "device": str(prepared.device), "torch": torch.__version__, "quantkit": quantkit.__version__,
    } | ({} if prepared.rotation is None else {"rotation": prepared.rotation.settings})  # fmt: skip


def _kept(prepared: Prepared, path: Path, made_by: dict[str, Any]) -> Measurement | None:
    """What a run of the same kind that was stopped has measured."""
    assert prepared.allocation is not None
    try:
        found = Measurement.read(path)
    except UsageError:
        return None
    is_same = found.fingerprint == prepared.source.reader.fingerprint() and found.made_by == made_by
    return found if is_same and prepared.allocation.lacking(found) is None else None


def _measure(
    prepared: Prepared, rows: CalibrationSet, made_by: dict[str, Any], folder: Path, dtype: torch.dtype, stage: Callable[[str], None]
) -> Measurement:
    assert prepared.allocation is not None
    candidates = {
        name: list({option.layers[name].scheme.name: option.layers[name] for option in unit.options.values()}.values())
        for unit in prepared.allocation.problem.units for name in unit.layers
    }  # fmt: skip
    runner = BlockRunner(prepared.architecture, device=prepared.device, dtype=dtype)
    scale_dtype = prepared.plan.format.scale_dtype(prepared.model_dtype)
    losses = SensitivityPass(runner, prepared.weights, rows, candidates, scale_dtype, folder, stage).run()
    origin, report = prepared.origin.name, rows.report
    return Measurement(origin, prepared.source.reader.fingerprint(), made_by, report.summary(), report.num_tokens, losses)


def tried(prepared: Prepared, divergence: DivergenceResult | None) -> Prepared:
    """With what the finished work came to, where it was measured, remembered beside what was predicted."""
    allocation = prepared.allocation
    if allocation is None or divergence is None:
        return prepared
    assert allocation.measurement is not None and allocation.solution is not None
    roundings = prepared.plan.roundings
    raw = allocation.solution.predicted / allocation.measurement.factor(roundings)
    if any(trial.predicted == raw and trial.measured == divergence.kl_mean for trial in allocation.measurement.trials):
        return prepared
    trial = Trial(prepared.plan.linear_bpw, raw, divergence.kl_mean, divergence.num_tokens, roundings)
    measurement = allocation.measurement.tried(trial)
    return replace(prepared, allocation=replace(allocation, measurement=measurement))


def tightened(prepared: Prepared, divergence: DivergenceResult | None) -> Prepared | None:
    """The next thing to try where the measured KL is above the one asked for; None where it is not, or nothing larger is left."""
    allocation = prepared.allocation
    if allocation is None or divergence is None or allocation.problem.budget.kind != "kl" or divergence.kl_mean <= allocation.problem.budget.amount:
        return None
    assert allocation.measurement is not None and allocation.solution is not None
    following = allocated(prepared, allocation.measurement)
    assert following.allocation is not None and following.allocation.solution is not None
    return following if following.allocation.solution.bits > allocation.solution.bits else None


def account(prepared: Prepared, divergence: DivergenceResult | None) -> dict[str, Any] | None:
    """What was asked, chosen, predicted and measured: for the report and for plots."""
    allocation = prepared.allocation
    if allocation is None:
        return None
    problem, solution, measurement = allocation.problem, allocation.solution, allocation.measurement
    assert solution is not None and measurement is not None
    factor = measurement.factor(prepared.plan.roundings)
    curve = [{"linear_bpw": bpw, "predicted_kl": kl} for bpw, kl in problem.curve(measurement.losses, factor)]
    uniform = problem.uniform(measurement.losses, factor)
    return {
        "budget": str(problem.budget), "kept": _is_kept(prepared, divergence),
        "linear_bpw": prepared.plan.linear_bpw, "file_bpw": prepared.plan.file_bpw,
        "predicted_kl": solution.predicted, "measured_kl": divergence.kl_mean if divergence else None, "factor": factor,
        "proven_within": max(0.0, solution.predicted - solution.bound), "units": solution.units, "measured_on": measurement.calibration,
        "uniform": {name: {"linear_bpw": bpw, "predicted_kl": kl} for name, (bpw, kl) in uniform.items()}, "pareto": curve,
    }  # fmt: skip


def _is_kept(prepared: Prepared, divergence: DivergenceResult | None) -> bool:
    assert prepared.allocation is not None
    budget = prepared.allocation.problem.budget
    if budget.kind == "kl":
        return divergence is not None and divergence.kl_mean <= budget.amount
    return (prepared.plan.file_bpw if budget.kind == "file" else prepared.plan.linear_bpw) <= budget.amount


def write_allocation(prepared: Prepared, outcome: dict[str, Any] | None, partial: Path, out: Path) -> list[str]:
    """The measurement and its outcome beside the model, and in the file the user named; with a picture. What a person should know of it."""
    if prepared.allocation is None or outcome is None:
        return []
    measurement = prepared.allocation.measurement
    assert measurement is not None
    if prepared.options.allocation is not None:
        measurement.write(measurement_path(prepared, out), outcome)
    measurement.write(partial / ALLOCATION_FILE, outcome)
    notes = draw_pareto(outcome, partial / PICTURE_FILE, prepared.origin.name)
    if not outcome["kept"]:
        reached = outcome["measured_kl"] if prepared.allocation.problem.budget.kind == "kl" else outcome["linear_bpw"]
        notes.append(f"{outcome['budget']} was asked for and {reached:.4g} was reached: nothing larger is left to choose from these candidates")
    return notes
