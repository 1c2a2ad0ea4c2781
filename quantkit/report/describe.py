"""What a checkpoint is, before anything is measured: container, size, and the account that its conversion left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.source import resolve
from quantkit.conversion.outcome import REPORT_FILE
from quantkit.formats.summary import Summary, summarize
from quantkit.models.architecture import load_config
from quantkit.report.schema import CheckpointResult, Conversion, LayerError


def describe(source: str, *, name: str | None = None, trust_remote_code: bool = False) -> CheckpointResult:
    """A checkpoint without results.

    Args:
        source: folder, hub id, or "reference".
        name: what to call it; the folder's own where None.

    Raises:
        SourceError, CheckpointError: it is not there, or not whole.
    """
    folder = resolve(source, trust_remote_code=trust_remote_code).folder
    summary = summarize(folder)
    schemes = Counter(layer.scheme for layer in summary.layers)
    return CheckpointResult(
        name=name or Path(source).name or source, source=source, fingerprint=CheckpointReader(folder).fingerprint(),
        container=summary.container or "unquantized", schemes=dict(sorted(schemes.items())), file_bytes=summary.file_bytes,
        bits_per_weight=summary.linear_bpw, conversion=_conversion(folder),
    )  # fmt: skip


def bytes_per_token(source: str, *, trust_remote_code: bool = False) -> int:
    """Weights, in bytes as they are stored, that one token of one request reads: all but the embedding's other rows and the experts not chosen."""
    folder = resolve(source, trust_remote_code=trust_remote_code).folder
    text = load_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    experts = next((getattr(text, name) for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, name, None)), 0)
    chosen = getattr(text, "num_experts_per_tok", None) or experts
    return weights_read(summarize(folder), vocabulary=int(text.vocab_size), experts=experts, chosen=chosen)


def weights_read(summary: Summary, *, vocabulary: int, experts: int, chosen: int) -> int:
    """The same of a summary; `chosen` of the `experts` of a layer are read."""
    total = 0.0
    for part in (*summary.layers, *summary.unquantized):
        is_embedding = part.shape[0] == vocabulary and ("embed" in part.name or "wte" in part.name)
        if is_embedding and not summary.is_tied:
            continue
        total += part.num_bytes * (chosen / experts if experts and ".experts." in part.name else 1)
    return round(total)


def _conversion(folder: Path) -> Conversion | None:
    """What quantkit wrote beside the weights; None of other tools' checkpoints."""
    try:
        account = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        layers = [LayerError(name=layer["name"], scheme=layer["scheme"], error=layer["error"]) for layer in account["layers"]]
        names = ("recipe", "seconds", "peak_memory_bytes", "calibration", "versions")
        return Conversion(**{name: account[name] for name in names}, layers=layers)
    except (OSError, ValueError, KeyError, TypeError):
        return None
