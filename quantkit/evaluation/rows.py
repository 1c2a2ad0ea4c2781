"""Text, or tokens made elsewhere, as rows to measure perplexity and KL divergence on.

Texts are tokenized as the model's tokenizer does it, joined with its end token, and cut into windows that do not overlap. Every window begins with
what the tokenizer puts before a text (BOS, mostly), has positions from 0, and every token in it but the first is predicted and counted. A rest too
short for a window is left out, unless there is no whole window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.models.compare import TokenRows
from quantkit.models.tokenizer import text_prefix
from quantkit.models.tokens import read_tokens
from quantkit.paths import packaged

DEFAULT_SEQ_LEN = 512
_CHARACTERS_A_TOKEN = 32
"""No tokenizer at hand makes fewer tokens of text than this allows; what is beyond need not be tokenized."""


def default_text() -> Path:
    """Held-out prose that ships with the reference model: it says little of other models, but needs no file."""
    return packaged("evals") / "reference" / "splits" / "prose.jsonl"


def rows_of_text(path: Path, tokenizer: Any, *, context: int, seq_len: int | None = None, max_tokens: int | None = None) -> TokenRows:
    """Windows of a text file.

    Args:
        path: plain text, or .jsonl whose lines have a `text`; each line is a text of its own.
        context: the longest row the model takes.
        seq_len: tokens a row, BOS included; None for 512 or the context, whichever is smaller.
        max_tokens: about how many tokens are counted, rounded up to whole rows; None for all.

    Raises:
        UsageError: the file is absent, empty or not readable, or the rows would be too short or too long.
    """
    seq_len = min(DEFAULT_SEQ_LEN, context) if seq_len is None else seq_len
    if not 2 <= seq_len <= context:
        raise UsageError(f"rows of {seq_len} tokens cannot be measured: the model takes 2 to {context}")
    prefix = text_prefix(tokenizer)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    ids: list[int] = []
    num_characters = (max_tokens or 0) * _CHARACTERS_A_TOKEN
    texts = _read_texts(path)
    for text in texts:
        part = text[:num_characters] if max_tokens else text
        ids += [*tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], *(end if len(texts) > 1 else [])]
        if max_tokens and len(ids) > max_tokens + seq_len:
            break
    return TokenRows.of_texts(_windows(ids, prefix, seq_len, max_tokens, path))


def rows_of_tokens(path: Path, *, vocabulary: int, context: int, max_tokens: int | None = None) -> TokenRows:
    """The rows of a safetensors file's `input_ids` [rows, T], whole.

    Raises:
        UsageError: there is no such file or tensor, or its rows do not fit the model.
    """
    ids = read_tokens(path, vocabulary=vocabulary, context=context)
    num_rows = len(ids) if max_tokens is None else -(-max_tokens // (ids.shape[1] - 1))
    return TokenRows.of_texts(ids[:num_rows])


def _windows(ids: list[int], prefix: list[int], seq_len: int, max_tokens: int | None, path: Path) -> Tensor:
    """int64 [rows, seq_len], or one shorter row."""
    body = seq_len - len(prefix)
    if body < 1:
        raise UsageError(f"rows of {seq_len} tokens hold nothing but the {len(prefix)} that the tokenizer puts before a text")
    num_rows = len(ids) // body
    if num_rows == 0:
        if len(prefix) + len(ids) < 2:
            raise UsageError(f"{path} holds no text to measure on: {len(ids)} tokens")
        return torch.tensor([[*prefix, *ids]])
    if max_tokens:
        num_rows = min(num_rows, -(-max_tokens // (seq_len - 1)))
    windows = torch.tensor(ids[: num_rows * body]).view(num_rows, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(num_rows, len(prefix)), windows], dim=1)


def _read_texts(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"no text file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else [text]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not JSON lines with a `text` each: {error}") from error
    odd = next((number for number, text in enumerate(texts, 1) if not isinstance(text, str)), None)
    if odd is not None:
        raise UsageError(f"{path} is not JSON lines with a `text` each: that of record {odd} is {texts[odd - 1]!r}, not a string")
    if not any(text.strip() for text in texts):
        raise UsageError(f"{path} is empty")
    return texts
