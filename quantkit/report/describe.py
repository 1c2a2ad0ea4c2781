"""What a checkpoint is, before anything is measured: container, size, and the account that its conversion left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from quantkit.checkpoint.source import resolve
from quantkit.conversion.outcome import REPORT_FILE
from quantkit.errors import UsageError
from quantkit.evaluation.fingerprint import model_fingerprint
from quantkit.formats.summary import summarize
from quantkit.models.architecture import load_config
from quantkit.report.schema import CheckpointResult, Conversion, LayerError

Matrix = tuple[str, tuple[int, ...], int]
"""A stored tensor's name, shape and bytes."""


def describe(source: str, *, trust_remote_code: bool = False) -> CheckpointResult:
    """A checkpoint without results.

    Args:
        source: folder, hub id, or "reference"; it goes by the last part of it.

    Raises:
        SourceError, CheckpointError: it is not there, or not whole. UsageError: its name cannot be written.
    """
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {source!r} is not UTF-8, so no report can hold it; give the folder another name") from error
    folder = resolve(source, trust_remote_code=trust_remote_code).folder
    summary = summarize(folder)
    schemes = Counter(layer.scheme for layer in summary.layers)
    return CheckpointResult(
        name=Path(source).name or source, source=source, fingerprint=model_fingerprint(folder),
        container=summary.container or "unquantized", schemes=dict(sorted(schemes.items())), file_bytes=summary.file_bytes,
        bits_per_weight=summary.linear_bpw, conversion=_conversion(folder),
    )  # fmt: skip


def bytes_per_token(source: str, *, trust_remote_code: bool = False) -> int:
    """Weights, in bytes as they are stored, that one token of one request reads: all but the embedding's other rows and the experts not chosen."""
    folder = resolve(source, trust_remote_code=trust_remote_code).folder
    summary = summarize(folder)
    matrices = [(part.name, part.shape, part.num_bytes) for part in (*summary.layers, *summary.unquantized)]
    return weights_read(matrices, load_config(folder, trust_remote_code=trust_remote_code))


def weights_read(matrices: Iterable[Matrix], config: PretrainedConfig) -> int:
    """The same of stored tensors."""
    text, matrices = config.get_text_config(), list(matrices)
    experts = next((getattr(text, name) for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, name, None)), 0)
    share = (getattr(text, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    has_head = any(name.startswith(("lm_head.", "embed_out.")) for name, _, _ in matrices)
    total = 0.0
    for name, shape, num_bytes in matrices:
        is_embedding = bool(shape) and shape[0] == text.vocab_size and ("embed" in name or "wte" in name) and not name.startswith("embed_out.")
        if is_embedding and has_head:
            continue
        total += num_bytes * (share if ".experts." in name else 1)
    return round(total)


def _conversion(folder: Path) -> Conversion | None:
    """What quantkit wrote beside the weights; None of other tools' checkpoints."""
    try:
        account = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        layers = [_layer(layer) for layer in account["layers"]]
        names = ("recipe", "seconds", "peak_memory_bytes", "calibration", "versions")
        experts = (account.get("experts") or {}).get("summary")
        return Conversion(**{name: account[name] for name in names}, layers=layers, experts=experts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _layer(entry: dict[str, Any]) -> LayerError:
    """Accounts of earlier versions say less."""
    given = {name: entry[name] for name in ("name", "scheme", "error")}
    return LayerError(**given, note=entry.get("note"), seen_tokens=entry.get("seen_tokens"))
