"""What a user may ask of calibration data. Invalid combinations cannot exist; whether the data is there is found out later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.errors import UsageError, did_you_mean
from quantkit.given import require_types

Layout = Literal["pack", "pad"]
_OF_TEXT = {"seq_len": None, "text_column": None, "prompt_column": None, "response_column": None, "layout": "pack", "seed": 0}
"""What says how rows are made of text, with the values that say nothing."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which documents, and how many tokens of them.

    Attributes:
        source: None for the built-in mix; else a .txt, .md, .raw, .jsonl, .json, .parquet or .csv file (all but parquet also .gz), a folder of such
            files, a data set "org/name[:config][:split]" or a short name such as "wikitext", or a .safetensors file of tokens.
        num_samples: Rows wanted. Fewer are made, and reported, when the data has fewer.
        seq_len: Tokens a row; None for 2048 or the model's context, whichever is smaller.
        text_column: The column that holds the text (or the list of messages).
        prompt_column: With `response_column`: two columns that make one turn each.
        layout: "pack" fills every row with documents end to end; "pad" gives each document a row of its own.
        seed: Decides which documents come first.
    """

    source: str | None = None
    num_samples: int = 256
    seq_len: int | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    layout: Layout = "pack"
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        if self.num_samples < 1:
            raise UsageError(f"calibration needs at least 1 row, num_samples is {self.num_samples}")
        if self.seq_len is not None and self.seq_len < 2:
            raise UsageError(f"a calibration row needs at least 2 tokens, seq_len is {self.seq_len}")
        if (self.prompt_column is None) != (self.response_column is None):
            raise UsageError("prompt_column and response_column come together: name both, or use text_column for a single column")
        if self.text_column is not None and self.prompt_column is not None:
            raise UsageError("name either text_column, or prompt_column and response_column")
        if self.is_tokens:
            unread = [name for name, usual in _OF_TEXT.items() if getattr(self, name) != usual]
            if unread:
                raise UsageError(f"{self.source} holds rows of tokens, which are taken as they are, first to last; leave out {', '.join(unread)}")
        if self.layout not in get_args(Layout):
            raise UsageError(f"unknown calibration layout {self.layout!r}; {did_you_mean(str(self.layout), get_args(Layout))}")

    @property
    def is_tokens(self) -> bool:
        """Whether the source is a file of tokens, made of text elsewhere."""
        return self.source is not None and self.source.endswith(".safetensors")
