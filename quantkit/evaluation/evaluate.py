"""The whole of `quantkit eval`: open, take rows, stream one or two models over them, report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.digest import content_digest
from quantkit.checkpoint.source import resolve
from quantkit.core.divergence import DivergenceResult, PerplexityResult
from quantkit.errors import QuantkitError, SourceError, UsageError, did_you_mean
from quantkit.evaluation.continuations import ContinuationResult, compare_continuations
from quantkit.evaluation.kept_states import states_file
from quantkit.evaluation.rows import default_text, rows_of_text, rows_of_tokens
from quantkit.formats.streamed import open_streamed
from quantkit.models.compare import Progress, StreamedModel, TokenRows, compare, perplexity
from quantkit.models.device import find_device
from quantkit.models.tokenizer import has_tokenizer, load_tokenizer
from quantkit.paths import cache_folder

_log = logging.getLogger("quantkit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What to measure on; every default is the recommended choice.

    Attributes:
        text: a text or .jsonl file; None for the prose that ships with the reference model.
        tokens: a safetensors file with `input_ids` [rows, T], instead of a text.
        seq_len: tokens a row of text; None for 512 or the model's context, whichever is smaller.
        max_tokens: tokens that are counted, rounded up to whole rows; None for all.
        batch_size: rows that pass through a block at once.
        device: "auto" takes a GPU where there is one.
        dtype: the type in which blocks are computed.
        with_continuations: let both models go on from the beginnings of the rows, too; each has to fit into memory.
        cache_dir: where a baseline's states are kept; None for the user's cache.
        is_fresh: compute them anew.
    """

    text: Path | None = None
    tokens: Path | None = None
    seq_len: int | None = None
    max_tokens: int | None = 65_536
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "float32"
    with_continuations: bool = False
    cache_dir: Path | None = None
    is_fresh: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.text is not None and self.tokens is not None:
            raise UsageError("give a text or tokens to measure on, not both")
        if self.tokens is not None and self.seq_len is not None:
            raise UsageError("the rows of a token file have their own length; leave out seq_len")
        for name in ("max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it is at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; {did_you_mean(self.dtype, DTYPES)}")


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What was measured. `perplexity` stands alone where there was no baseline; else everything is in `divergence`."""

    model: str
    baseline: str | None
    measured_on: str
    num_rows: int
    seq_len: int
    seconds: float
    perplexity: PerplexityResult | None = None
    divergence: DivergenceResult | None = None
    continuations: ContinuationResult | None = None

    def to_dict(self) -> dict[str, Any]:
        head = {name: getattr(self, name) for name in ("model", "baseline", "measured_on", "num_rows", "seq_len", "seconds")}
        result = self.divergence or self.perplexity
        assert result is not None
        continuations = {"continuations": self.continuations.to_dict()} if self.continuations else {}
        return head | {"result": result.to_dict()} | continuations


def evaluate(
    model: str | Path, *, baseline: str | Path | None = None, options: EvaluationOptions | None = None, progress: Progress | None = None
) -> EvaluationReport:
    """Perplexity of a model and, beside a baseline, KL divergence and agreement, over the same rows.

    Args:
        model, baseline: folders, Hub ids, or "reference"; quantized or not.

    Raises:
        QuantkitError: one of its kinds: a model that cannot be opened or gives NaN, a text that cannot be read, models with unlike vocabularies.
    """
    options = options or EvaluationOptions()
    started = time.monotonic()
    device = find_device(options.device)
    quantized = _open(model, "the quantized model" if baseline else "the model", options)
    base = _open(baseline, "the baseline model", options) if baseline else None
    rows, measured_on = _rows(model, baseline, quantized, options)
    settings = {"batch_size": options.batch_size, "device": device, "dtype": DTYPES[options.dtype], "progress": progress}
    divergence = compare(base, quantized, rows, **settings, kept=_kept(str(baseline), rows, options)) if base else None
    alone = perplexity(quantized, rows, **settings) if base is None else None
    continuations = None
    if options.with_continuations:
        if baseline is None:
            raise UsageError("continuations are compared with the original model's; name it with --baseline")
        continuations = _continuations(str(model), str(baseline), rows, options)
    return EvaluationReport(
        model=str(model), baseline=str(baseline) if baseline else None, measured_on=measured_on, num_rows=len(rows.input_ids),
        seq_len=rows.input_ids.shape[1], seconds=round(time.monotonic() - started, 3), perplexity=alone, divergence=divergence,
        continuations=continuations,
    )  # fmt: skip


def _continuations(model: str, baseline: str, rows: TokenRows, options: EvaluationOptions) -> ContinuationResult | None:
    """None, and the reason in the log, where the runtime cannot hold the models: what was found before is a result still."""
    try:
        return compare_continuations(model, baseline, rows, device=options.device, trust_remote_code=options.trust_remote_code)
    except (QuantkitError, MemoryError, RuntimeError) as error:
        _log.warning("continuations could not be compared: %s", error)
        return None


def _kept(baseline: str, rows: TokenRows, options: EvaluationOptions) -> Path | None:
    folder = resolve(baseline, trust_remote_code=options.trust_remote_code).folder
    identity = f"{content_digest(folder)} {find_device(options.device)} {version('transformers')}"
    path = states_file(options.cache_dir or cache_folder("states"), identity, rows, DTYPES[options.dtype])
    if options.is_fresh and path is not None:
        path.unlink(missing_ok=True)
    return path


def _open(model: str | Path, label: str, options: EvaluationOptions) -> StreamedModel:
    folder = resolve(str(model), trust_remote_code=options.trust_remote_code).folder
    return open_streamed(folder, label, trust_remote_code=options.trust_remote_code)


def _require_same_tokens(model: str | Path, baseline: str | Path | None, own: Any, other: Any) -> None:
    """Raises SourceError where an id means one token to one model and another to the other: what they say of it cannot be compared."""
    meanings = {number: token for token, number in other.get_vocab().items()}
    odd = [(number, token) for token, number in own.get_vocab().items() if meanings.get(number, token) != token]
    if odd:
        number, token = min(odd)
        reason = f"{len(odd):,} ids mean other tokens, such as {number}: {token!r} and {meanings[number]!r}"
        raise SourceError(f"{model} has another tokenizer than {baseline} ({reason}), so they cannot be compared")


def _rows(model: str | Path, baseline: str | Path | None, quantized: StreamedModel, options: EvaluationOptions) -> tuple[TokenRows, str]:
    architecture = quantized.architecture
    if options.tokens is not None:
        rows = rows_of_tokens(options.tokens, vocabulary=quantized.vocabulary, context=architecture.context, max_tokens=options.max_tokens)
        return rows, str(options.tokens)
    folders = [resolve(str(m), trust_remote_code=options.trust_remote_code).folder for m in (model, baseline) if m]
    tokenizers = [load_tokenizer(folder, trust_remote_code=options.trust_remote_code) for folder in folders if has_tokenizer(folder)]
    if not tokenizers:
        load_tokenizer(folders[0], trust_remote_code=options.trust_remote_code)  # says what is missing
    if len(tokenizers) > 1:
        _require_same_tokens(model, baseline, *tokenizers)
    tokenizer = tokenizers[0]
    path = options.text or default_text()
    rows = rows_of_text(path, tokenizer, context=architecture.context, seq_len=options.seq_len, max_tokens=options.max_tokens)
    return rows, str(path) if options.text else "held-out prose of the reference model (built in; give a text of your own with --text)"
