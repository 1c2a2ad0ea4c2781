"""The model card of an output, and what it keeps of the source's: the licence first of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from quantkit.conversion.report import ConversionReport, bits_in_words, figure

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")


def model_card(report: ConversionReport, base_model: str, front_matter: dict[str, Any]) -> str:
    """README.md of the output: where it comes from, how it was made, what it cost, under which licence.

    Args:
        base_model: what to call the original.
        front_matter: the original's own, as `kept_front_matter` reads it.
    """
    rows = [
        *([("recipe", report.recipe)] if report.recipe else []),
        ("container", report.format),
        ("size", f"{report.bytes_before / 1e6:,.1f} MB -> {report.bytes_after / 1e6:,.1f} MB"),
        ("bits per weight", bits_in_words(report.linear_bpw, report.file_bpw)),
    ]
    if report.losslessness:
        rows.append(("against its quantized source", report.losslessness))
    elif worst := report.worst:
        rows.append(("mean / worst layer error", f"{report.mean_error:.2e} / {worst.error:.2e} ({worst.name})"))
    if report.kv_cache:
        rows.append(("KV cache", report.kv_cache))
    if report.calibration:
        rows.append(("calibration", report.calibration.removeprefix("calibration: ")))
    if report.divergence:
        d = report.divergence
        rows.append(("perplexity on held-out calibration rows", f"{figure(d['ppl_baseline'])} -> {figure(d['ppl_quantized'])}"))
        rows.append(("KL divergence from the original", f"{figure(d['kl_mean'], 5)} ± {figure(d['kl_se'], 5)} nats over {d['num_tokens']} tokens"))
        rows.append(("same most likely token", f"{100 * d['top1']:.2f}%"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    account = "Every layer's figures are in quantkit_report.json" + (", the recipe in recipe.yaml." if report.recipe else ".")
    known = {"base_model": base_model} if "/" in base_model else {}
    front = yaml.safe_dump(front_matter | known | {"library_name": "transformers", "tags": ["quantkit", report.format]}, sort_keys=False)
    return f"---\n{front}---\n# {base_model} by quantkit\n\n| | |\n|---|---|\n{table}\n\n{account}\n"


def kept_front_matter(card: Path) -> dict[str, Any]:
    """Of a model's README.md, what stays true of its quantized form; nothing where there is no card or no front matter in it."""
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        given = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return {key: given[key] for key in _KEPT if key in given} if isinstance(given, dict) else {}
