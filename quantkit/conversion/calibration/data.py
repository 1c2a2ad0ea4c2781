"""What calibration hands on: rows of tokens, and the account of where they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """`dropped` counts documents by the reason they were left out; `notes` are sentences a person should read."""

    source: str
    num_documents: int
    num_tokens: int
    rows: int
    seq_len: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def mean_document_length(self) -> float:
        """Valid tokens a document, after cutting."""
        return self.num_tokens / max(self.num_documents, 1)

    def summary(self) -> str:
        parts = [
            f"calibration: {self.rows} rows x {self.seq_len} tokens from {self.source}",
            f"{self.num_tokens} tokens of {self.num_documents} documents, {self.mean_document_length:.0f} each",
        ]
        if self.dropped:
            parts.append("dropped " + ", ".join(f"{count} ({reason})" for reason, count in sorted(self.dropped.items())))
        return "; ".join([*parts, *self.notes])


@dataclass(eq=False, slots=True)
class CalibrationSet:
    """Rows for a causal model, on the CPU.

    Give a model `input_ids` and `position_ids`, no attention mask and no cache (`use_cache=False`): transformers then masks attention
    across documents, because positions restart at 0 with each of them. Padding stands behind the documents and restarts at 0 too.
    """

    input_ids: Tensor  # int64 [rows, seq_len]
    position_ids: Tensor  # int64 [rows, seq_len]
    valid: Tensor  # bool [rows, seq_len], False on padding
    report: CalibrationReport

    def split(self, num_held_out: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Rows to calibrate with, and the last `num_held_out` rows to measure on. A part counts the pieces of documents it holds."""
        rows = len(self.input_ids)
        if not 0 < num_held_out < rows:
            raise CalibrationError(f"cannot hold out {num_held_out} of {rows} calibration rows: hold out at least 1 and leave at least 1")
        return self._rows(0, rows - num_held_out), self._rows(rows - num_held_out, rows)

    def _rows(self, start: int, stop: int) -> CalibrationSet:
        input_ids, position_ids, valid = (t[start:stop] for t in (self.input_ids, self.position_ids, self.valid))
        num_pieces = int((valid & (position_ids == 0)).sum())
        num_documents = min(num_pieces, self.report.num_documents)
        report = replace(self.report, rows=stop - start, num_tokens=int(valid.sum()), num_documents=num_documents)
        return CalibrationSet(input_ids, position_ids, valid, report)

    @property
    def fingerprint(self) -> str:
        """sha256 of shape, ids, positions and validity: equal exactly when a calibration run sees the same rows."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.position_ids, self.valid):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
