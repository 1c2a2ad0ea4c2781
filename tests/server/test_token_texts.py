"""Names of single tokens: together they are the text, byte for byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import decoders, pre_tokenizers

from quantkit.server.openai.token_texts import TokenTexts


def of_pieces(pieces: list[str], decoder: object, special: tuple[int, ...] = ()) -> TokenTexts:
    def piece(token: int) -> str | None:
        return pieces[token] if token < len(pieces) else None

    backend = SimpleNamespace(decoder=decoder)
    return TokenTexts(SimpleNamespace(all_special_ids=list(special), backend_tokenizer=backend, convert_ids_to_tokens=piece))


def byte_pieces(text: str) -> list[str]:
    """The text's bytes, each as GPT-2 writes it."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [character for word, _ in pre.pre_tokenize_str(text) for character in word]


@pytest.mark.parametrize("text", ["plain words", "é 漢字 🙂", "\n\t\x00"])
def test_bytes_of_a_byte_level_vocabulary_are_the_texts(text: str) -> None:
    pieces = byte_pieces(text)
    texts = of_pieces(pieces, decoders.ByteLevel())

    assert b"".join(map(texts.bytes_of, range(len(pieces)))) == text.encode()
    assert sum(map(texts.length_of, range(len(pieces)))) == len(text)


def test_part_of_a_character_has_a_name_of_its_own() -> None:
    texts = of_pieces(byte_pieces("é"), decoders.ByteLevel())

    assert [texts.text_of(0), texts.text_of(1)] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_sentencepiece_keeps_its_spaces_and_bytes() -> None:
    texts = of_pieces(["▁the", "re", "<0xE6>", "</s>"], decoders.ByteFallback(), special=(3,))

    assert [texts.bytes_of(i) for i in range(4)] == [b" the", b"re", b"\xe6", b"</s>"]
    assert texts.length_of(3) == 0


def test_ids_without_a_piece_go_by_number() -> None:
    assert of_pieces(["a"], None).text_of(7) == TokenTexts(None).text_of(7) == "token_id:7"
