"""Log-probabilities in the forms of the two endpoints: the model's own, as they came from it, so that equal ones compare equal."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.runtime.sampler import TokenLogprobs
from quantkit.server.openai.responses import ChatLogprobs, LegacyLogprobs, TokenLogprob, TopLogprob
from quantkit.server.openai.token_texts import TokenTexts

_LOWEST = -9999.0
"""JSON knows no infinity."""


def legacy_logprobs(tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], texts: TokenTexts, offset: int) -> tuple[LegacyLogprobs, int]:
    """Those of /v1/completions, and the offset behind them.

    Args:
        entries: one a token; None has no number, as the first of a prompt.
        offset: of the first token in the text.
    """
    result = LegacyLogprobs()
    for token, entry in zip(tokens, entries, strict=True):
        result.tokens.append(texts.text_of(token))
        result.text_offset.append(offset)
        result.token_logprobs.append(None if entry is None else _finite(entry.logprob))
        result.top_logprobs.append(None if entry is None else _by_text(entry, texts))
        offset += texts.length_of(token)
    return result, offset


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> ChatLogprobs:
    """Those of /v1/chat/completions."""
    return ChatLogprobs(content=[
        TokenLogprob(**_named(entry.token, entry.logprob, texts), top_logprobs=[TopLogprob(**_named(*top, texts)) for top in entry.top])
        for entry in entries
    ])  # fmt: skip


def _by_text(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """The most likely first, the token itself among them; of tokens with one text the most likely is kept."""
    result: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        result.setdefault(texts.text_of(token), _finite(logprob))
    return result


def _named(token: int, logprob: float, texts: TokenTexts) -> dict[str, object]:
    return {"token": texts.text_of(token), "logprob": _finite(logprob), "bytes": list(texts.bytes_of(token))}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
