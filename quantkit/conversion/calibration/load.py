"""Options and a tokenizer -> a CalibrationSet: open, read within a budget, shuffle, tokenize as much as is needed, lay out."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from quantkit.conversion.calibration.data import CalibrationReport, CalibrationSet
from quantkit.conversion.calibration.documents import Document, Documents
from quantkit.conversion.calibration.options import CalibrationOptions
from quantkit.conversion.calibration.packing import Encoder, Rows, pack, pad, pad_id
from quantkit.conversion.calibration.records import Budget
from quantkit.conversion.calibration.sources import open_source
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SEQ_LEN = 2048
MIN_BUDGET = 32 << 20
BYTES_PER_TOKEN_READ = 48  # about twelve times the text that is needed: enough to choose from at random


def load_calibration(options: CalibrationOptions, tokenizer: Any, *, context: int, held_out: bool = False) -> CalibrationSet:
    """The rows to calibrate on; the same options, file and tokenizer give the same rows.

    Args:
        tokenizer: The model's, with its chat template.
        context: The most tokens the model takes at once.
        held_out: Of the built-in mix, take the documents that are never calibrated on; other sources have none and are read whole.

    Raises:
        CalibrationError: The source is missing, unreadable or empty, or does not fill one row. Fewer rows than asked are made, and
            said in the report, as long as there is one.
    """
    seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, context)
    if seq_len > context:
        raise CalibrationError(f"seq_len {seq_len} is beyond the model's context of {context} tokens; use {context} or less")
    needed = options.num_samples * seq_len
    budget = Budget(max(MIN_BUDGET, needed * BYTES_PER_TOKEN_READ))
    name, records = open_source(options.source, budget, options.seed, held_out=held_out)
    reader = Documents(options, name)
    try:
        documents: list[Document] = list(reader.read(records))
    except OSError as error:
        raise CalibrationError(f"cannot read {name}: {error}") from error
    if not documents:
        reasons = ", ".join(f"{count} records: {reason}" for reason, count in reader.dropped.items()) or "no records"
        raise CalibrationError(f"{name} holds no calibration text ({reasons})")
    random.Random(options.seed).shuffle(documents)

    encoder = Encoder(tokenizer, reader.dropped)
    encoded = encoder.encode(documents)
    lay_out = pack if options.layout == "pack" else pad
    rows = lay_out(encoded, encoder.prefix, options.num_samples, seq_len)
    if not rows.ids:
        raise CalibrationError(
            f"{name} is too short: {rows.num_seen} tokens in {len(documents)} documents do not fill one row of {seq_len} "
            f"({options.num_samples} rows need {needed} tokens); give more text or a smaller seq_len"
        )
    notes = [*encoder.notes, *budget.notes]
    if len(rows.ids) < options.num_samples:
        notes.append(f"fewer rows than the {options.num_samples} asked for: the data ends after {len(rows.ids)}")
    input_ids, position_ids, valid = _tensors(rows, seq_len, pad_id(tokenizer))
    report = CalibrationReport(
        source=name,
        num_documents=rows.num_documents,
        num_tokens=rows.num_tokens,
        rows=len(rows.ids),
        seq_len=seq_len,
        dropped=dict(reader.dropped),
        notes=tuple(notes),
    )
    return CalibrationSet(input_ids, position_ids, valid, report)


def _tensors(rows: Rows, seq_len: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    shape = (len(rows.ids), seq_len)
    input_ids = torch.full(shape, fill, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    valid = torch.zeros(shape, dtype=torch.bool)
    for i, (ids, pieces) in enumerate(zip(rows.ids, rows.pieces, strict=True)):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        valid[i, : len(ids)] = True
        lengths = [*pieces, seq_len - len(ids)]
        position_ids[i] = torch.cat([torch.arange(length) for length in lengths])
    return input_ids, position_ids, valid
