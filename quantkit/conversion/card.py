"""The model card of an output: where it comes from, how it was made, what it cost, how to load it; and what it keeps of the original's card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from quantkit.checkpoint.weight_files import some
from quantkit.conversion.report import AS_IT_WAS, ConversionReport, LayerResult, bits_in_words, figure
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.engine_loading import how_to_load
from quantkit.formats.engines import Verdict

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")
_HUBS = {"modelscope:": "https://modelscope.cn/models/", "": "https://huggingface.co/"}
_FALLEN = "Otherwise than the recipe says"
_NAMED = 4
"""Layers of one kind that are named before the others are counted."""


def model_card(report: ConversionReport, base_model: str, front_matter: dict[str, Any], verdicts: Sequence[Verdict]) -> str:
    """README.md of the output.

    Args:
        base_model: what to call the original.
        front_matter: the original's own, as `kept_front_matter` reads it.
        verdicts: on the output, of every engine that is known.
    """
    front = yaml.safe_dump(_front_matter(report, base_model, front_matter), sort_keys=False, allow_unicode=True)
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _rows(report))
    account = "Every layer's figures are in quantkit_report.json" + (", the recipe as it was run in recipe.yaml." if report.recipe else ".")
    parts = [
        f"---\n{front}---", f"# {base_model} by quantkit", _origin(report, base_model), f"| | |\n|---|---|\n{table}", account,
        *_exceptions(report), *_loading(Path(report.output).name, verdicts),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


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


def _front_matter(report: ConversionReport, base_model: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What the hub reads. A folder's name is no base model there, nor is that of another hub's."""
    known = {"base_model": base_model} if _hub(report, base_model) == _HUBS[""] else {}
    merged = {"pipeline_tag": "text-generation"} | kept | known
    relation = {"base_model_relation": "quantized"} if "base_model" in merged and report.quantized else {}
    container = report.format.removesuffix("-v2")
    return merged | relation | {"library_name": "transformers", "tags": ["quantkit", container, *_bits(report.quantized)]}


def _bits(layers: Iterable[LayerResult]) -> list[str]:
    """A tag for the width that most layers have."""
    weights = [parse_scheme(layer.scheme).weight for layer in layers]
    widths = Counter(weight.bits for weight in weights if weight is not None)
    return [f"{widths.most_common(1)[0][0]}-bit"] if widths else []


def _hub(report: ConversionReport, base_model: str) -> str | None:
    """The address before the original's name; None of a folder."""
    prefix = next(prefix for prefix in _HUBS if report.source.startswith(prefix))
    return _HUBS[prefix] if base_model == report.source.removeprefix(prefix) and "/" in base_model else None


def _origin(report: ConversionReport, base_model: str) -> str:
    hub, form = _hub(report, base_model), "A quantized form" if report.quantized else "The weights"
    if hub is not None:
        return f"{form} of [{base_model}]({hub}{base_model}), whose card says what the model is, and under which terms it may be used."
    if "README.md" in report.left_behind:
        return f"{form} of the model in the folder {base_model}, whose own README.md says what it is and is not part of this one."
    return f"{form} of the model {base_model}."


def _rows(report: ConversionReport) -> list[tuple[str, str]]:
    kinds = Counter((layer.scheme, AS_IT_WAS if layer.rounding == AS_IT_WAS else f"by {layer.rounding}") for layer in report.quantized)
    layers = ", ".join(f"{count} {scheme} {how}" for (scheme, how), count in kinds.items())
    data = report.calibration or ("none; weights alone were looked at" if report.recipe else None)
    found = [
        ("recipe", report.recipe),
        ("container", report.format),
        ("quantized layers", layers),
        ("size", f"{report.bytes_before / 1e6:,.1f} MB -> {report.bytes_after / 1e6:,.1f} MB"),
        ("bits per weight", bits_in_words(report.linear_bpw, report.file_bpw)),
        ("against its quantized source", report.losslessness),
        ("calibration", data and data.removeprefix("calibration: ")),
        ("KV cache", report.kv_cache),
        ("experts", report.experts["summary"] if report.experts else None),
        *(_measured(report) if report.recipe else ()),
    ]
    if report.worst is not None and not report.losslessness:
        found.append(("mean / worst layer error", f"{report.mean_error:.2e} / {report.worst.error:.2e} ({report.worst.name})"))
    found.append(("made by", ", ".join(f"{name} {version}" for name, version in report.versions.items()) or "quantkit"))
    return [(name, value) for name, value in found if value]


def _measured(report: ConversionReport) -> list[tuple[str, str]]:
    """What was found on held-out calibration rows, with standard errors."""
    d = report.divergence
    if d is None:
        how = f"quantkit eval {quote(report.output)} --baseline {quote(report.source)}"
        return [("perplexity, KL divergence, same most likely token", f"not measured; `{how}` does")]
    ppl = [f"{figure(d[f'ppl_{which}'])} ± {figure(d[f'ppl_{which}_se'])}" for which in ("baseline", "quantized")]
    return [
        ("KL divergence from the original", f"{figure(d['kl_mean'], 5)} ± {figure(d['kl_se'], 5)} nats over {d['num_tokens']:,} held-out tokens"),
        ("perplexity on the same tokens", f"{ppl[0]} -> {ppl[1]}, ratio {figure(d['ppl_ratio'])} ± {figure(d['ppl_ratio_se'])}"),
        ("same most likely token", f"{_share(d['top1'])}% ± {_share(d['top1_se'])}%"),
    ]


def _share(value: float | None) -> str:
    return figure(None if value is None else 100 * value, 2)


def _exceptions(report: ConversionReport) -> list[str]:
    """Layers that keep their type, and those that are stored or rounded otherwise than the recipe asks, each with the reason."""
    parts = []
    fallen = [(layer.name, layer.note) for layer in report.layers if layer.note]
    for title, named in (("Left as they were", list(report.left_alone.items())), (_FALLEN if report.recipe else "Not as they were", fallen)):
        by_reason: dict[str, list[str]] = {}
        for name, reason in named:
            by_reason.setdefault(reason, []).append(name)
        lines = [f"- {_cell(reason)}: {some([f'`{name}`' for name in names], _NAMED)}" for reason, names in by_reason.items()]
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    notes = [f"- {_cell(note)}" for note in report.notes]
    return parts + (["## Notes", "\n".join(notes)] if notes else [])


def _loading(model: str, verdicts: Sequence[Verdict]) -> list[str]:
    """A command for every engine that loads the output, and why the others do not."""
    parts = ["## How to load it", f"For `{model}`, give the folder's path or the name of its repository on the hub."]
    for verdict in verdicts:
        if verdict.loads:
            language, text = how_to_load(verdict.engine, model)
            remarks = [f"- {remark}" for remark in (verdict.reason, *verdict.notes) if remark]
            parts += [f"### {verdict.engine} {verdict.version}", f"```{language}\n{text}\n```", *(["\n".join(remarks)] if remarks else [])]
    words = {False: "cannot", None: "not known"}
    others = [f"- {v.engine} {v.version}: {words[v.loads]}{f'; {v.reason}' if v.reason else ''}" for v in verdicts if not v.loads]
    return parts + (["### Other engines", "\n".join(others)] if others else [])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
