"""What lies beside the weights of an output: the report, the recipe, the card, the configuration and the source's own side files."""

from __future__ import annotations

import json
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.checkpoint.disk import write_atomically
from quantkit.checkpoint.output import copy_side_files
from quantkit.checkpoint.side_files import left_behind
from quantkit.conversion.allocation_file import ALLOCATION_FILE, PICTURE_FILE
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.card import kept_front_matter, model_card
from quantkit.conversion.coverage import coverage
from quantkit.conversion.prepare import Prepared
from quantkit.conversion.report import ConversionReport, LayerResult
from quantkit.conversion.rows import account, figures
from quantkit.core.divergence import DivergenceResult
from quantkit.formats.kv_scales import KV_CACHES, in_words
from quantkit.formats.summary import summarize

REPORT_FILE, RECIPE_FILE, CARD_FILE = "quantkit_report.json", "recipe.yaml", "README.md"
_OWN_FILES = (CARD_FILE, REPORT_FILE, RECIPE_FILE, ALLOCATION_FILE, PICTURE_FILE)


def make_report(
    prepared: Prepared, out: Path, results: list[LayerResult], divergence: DivergenceResult | None, rows: CalibrationSet | None, seconds: float,
    allocation: dict[str, Any] | None = None,
) -> ConversionReport:
    plan, folder, recipe = prepared.plan, prepared.origin.folder, prepared.recipe
    reached = coverage(results, saw_all=plan.calibrates_all_experts)
    own = _OWN_FILES if recipe else [name for name in _OWN_FILES if name != RECIPE_FILE]
    behind = left_behind(folder, weights=prepared.source.reader.files, exclude=own)
    return ConversionReport(
        source=prepared.origin.given, output=str(out), recipe=recipe.name if recipe else None, format=plan.format.name, layers=results,
        left_alone=plan.left_alone, bytes_before=plan.bytes_before, bytes_after=plan.bytes_after, linear_bpw=plan.linear_bpw,
        file_bpw=plan.file_bpw, seconds=seconds, peak_memory_bytes=peak_memory(),
        kv_cache=None if plan.kv_cache is None else in_words(KV_CACHES[plan.kv_cache.name]),
        calibration=account(rows, prepared.options) if rows else None,
        calibration_data=figures(rows, prepared.options) if rows else None, experts=reached.to_dict() if reached else None,
        divergence=divergence.to_dict() if divergence else None,
        versions={name: version(name) for name in ("quantkit", "torch", "transformers")}, notes=[*plan.notes, *_without_place(results)],
        left_behind=[path.as_posix() for path in behind], allocation=allocation,
    )  # fmt: skip


def _without_place(results: list[LayerResult]) -> list[str]:
    """A note on the layers whose transform found no place."""
    asked = [result for result in results if result.transform]
    without = [result for result in asked if " into " not in result.transform]
    if not without:
        return []
    who = "no layer's transform" if len(without) == len(asked) else f"the transform of {len(without)} of {len(asked)} layers"
    return [f"{who} could {'' if len(without) == len(asked) else 'not '}be folded; {without[0].name}: {without[0].transform}"]


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_side_files(prepared: Prepared, partial: Path, report: ConversionReport) -> None:
    """Everything beside the weights; behind config.json, which makes the folder a model, comes only the card, which says who loads it."""
    copy_side_files(prepared.origin.folder, partial, exclude=_OWN_FILES)
    config = {k: v for k, v in prepared.source.reader.config.items() if k not in ("quantization_config", "compression_config")}
    if (dtype := prepared.options.carried_dtype) is not None:
        name = str(dtype).removeprefix("torch.")
        config |= {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    if prepared.rotation is not None:
        config = prepared.rotation.configured(config)
    quantization = prepared.plan.config
    if quantization is not None:
        config["quantization_config"] = quantization
    if (recipe := _recipe_text(prepared)) is not None:
        _write_text(partial / RECIPE_FILE, recipe)
    _write_text(partial / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    if quantization is not None and quantization["quant_method"] == "gptq":
        _write_text(partial / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")
    _write_text(partial / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    kept = kept_front_matter(prepared.origin.folder / CARD_FILE)
    _write_text(partial / CARD_FILE, model_card(report, prepared.origin.name, kept, summarize(partial).verdicts))


def _recipe_text(prepared: Prepared) -> str | None:
    """The recipe in force; where nothing was quantized, the source's own, which its codes were made by."""
    if prepared.recipe is not None:
        return prepared.recipe.to_yaml()
    own = prepared.origin.folder / RECIPE_FILE
    return own.read_text(encoding="utf-8", errors="replace") if own.is_file() else None


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
