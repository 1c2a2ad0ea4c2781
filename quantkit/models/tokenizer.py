"""A model folder's tokenizer, or a clear word on why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quantkit.errors import SourceError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tiktoken.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer lies in the folder."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        SourceError: there is none, it is damaged, or it needs code of its own.
    """
    if not has_tokenizer(folder):
        raise SourceError(f"{folder} has no tokenizer ({', '.join(_FILES[:3])}); copy the original model's tokenizer files into it")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what transformers and tokenizers raise for a damaged file is not one family
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def text_prefix(tokenizer: Any) -> list[int]:
    """The tokens, mostly one BOS or none, that the tokenizer puts before every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else []
