"""Rows: BOS exactly once, nothing leaks between documents, nothing is lost in silence, the seed decides."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.conversion.calibration import CalibrationOptions, load_calibration
from quantkit.conversion.calibration.packing import MIN_PIECE, pack, special_ends

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix jugs of boxing liquid".split()  # noqa: SIM905


def documents(count: int, length: int = 12) -> list[dict[str, str]]:
    return [{"text": " ".join([f"document {i}:", *(WORDS[(i * j) % len(WORDS)] for j in range(length))])} for i in range(count)]


def pieces(calibration, row: int) -> list[list[int]]:
    """The ids of a row, cut where positions restart, padding left out."""
    starts = (calibration.position_ids[row] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], calibration.input_ids.shape[1]]
    return [calibration.input_ids[row, a:b].tolist() for a, b in zip(starts, ends, strict=True) if calibration.valid[row, a]]


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
@pytest.mark.parametrize("content", ["plain", "with-bos", "chat"])
def test_bos_stands_exactly_once_before_every_piece_as_the_tokenizer_says(bos, content, write, tokenizer_factory):
    tokenizer = tokenizer_factory(bos=bos)
    texts = [row["text"] for row in documents(20)]
    rows = {
        "plain": [{"text": text} for text in texts],
        "with-bos": [{"text": "<s>" + text} for text in texts],
        "chat": [{"messages": [{"role": "user", "content": text}]} for text in texts],
    }[content]
    calibration = load_calibration(CalibrationOptions(write("d.jsonl", rows), num_samples=4, seq_len=128), tokenizer, context=512)
    for row in range(4):
        for piece in pieces(calibration, row):
            if bos:
                assert piece.count(0) == 1 and piece[0] == 0
            else:
                assert piece.count(0) <= (content != "plain")  # what the text or the template itself says stays


@pytest.mark.parametrize("model", ["reference_tokenizer", "stories_tokenizer"])
def test_real_tokenizers_begin_every_piece_with_one_bos(model, write, request):
    tokenizer = request.getfixturevalue(model)
    path = write("d.jsonl", [*documents(20), *({"messages": [{"role": "user", "content": row["text"]}]} for row in documents(20))])
    calibration = load_calibration(CalibrationOptions(path, num_samples=4, seq_len=100), tokenizer, context=512)
    found = [piece for row in range(4) for piece in pieces(calibration, row)]
    assert all(piece[0] == tokenizer.bos_token_id and piece.count(tokenizer.bos_token_id) == 1 for piece in found)


def test_a_tokenizer_that_ends_texts_with_eos_is_obeyed(write, tokenizer_factory):
    tokenizer = tokenizer_factory(eos=True)
    assert special_ends(tokenizer) == ([0], [1])
    calibration = load_calibration(CalibrationOptions(write("d.jsonl", [{"text": "abc"}]), layout="pad", num_samples=1), tokenizer, context=16)
    assert calibration.input_ids[0][calibration.valid[0]].tolist() == tokenizer("abc")["input_ids"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_document_sees_another(attention, write, byte_tokenizer):
    """Given rows as calibration makes them, when document A changes, then the hidden states of the others stay (1e-6, float32)."""
    path = write("d.jsonl", documents(12))
    calibration = load_calibration(CalibrationOptions(path, num_samples=2, seq_len=256), byte_tokenizer, context=512)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().model
    starts = (calibration.position_ids[0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 3
    changed = calibration.input_ids.clone()
    changed[0, starts[0] + 1 : starts[1]] = torch.randint(10, 250, (starts[1] - starts[0] - 1,))
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=calibration.position_ids, use_cache=False).last_hidden_state for ids in (calibration.input_ids, changed)
        )
        alone = model(input_ids=calibration.input_ids[:1, starts[1] : starts[2]], use_cache=False).last_hidden_state
    assert (before[0, : starts[1]] - after[0, : starts[1]]).abs().max() > 1e-2
    torch.testing.assert_close(before[0, starts[1] :], after[0, starts[1] :], atol=1e-6, rtol=0)
    torch.testing.assert_close(before[1], after[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(before[0, starts[1] : starts[2]], alone[0], atol=2e-6, rtol=1e-5)


def test_padding_changes_no_valid_state(write, byte_tokenizer):
    path = write("d.jsonl", documents(4))
    calibration = load_calibration(CalibrationOptions(path, num_samples=4, seq_len=200, layout="pad"), byte_tokenizer, context=512)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)).eval()
    changed = calibration.input_ids.masked_fill(~calibration.valid, 77)
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=calibration.position_ids, use_cache=False).logits for ids in (calibration.input_ids, changed)
        )
    torch.testing.assert_close(before[calibration.valid], after[calibration.valid], atol=1e-6, rtol=0)


def test_packing_loses_no_token_but_rests_and_the_last_row():
    texts = [list(range(100 * i, 100 * i + length)) for i, length in enumerate((5, 40, 1, 63, 20, 22), start=1)]
    rows = pack(texts, [0], num_rows=100, seq_len=32)
    assert all(len(row) == 32 == sum(lengths) for row, lengths in zip(rows.ids, rows.pieces, strict=True))
    kept = [token for row in rows.ids for token in row if token]
    flat = [token for text in texts for token in text]
    assert set(kept) <= set(flat) and len(kept) == len(set(kept))
    assert len(flat) - len(kept) < 32 + len(texts) * MIN_PIECE


def test_a_long_document_waits_until_every_other_had_its_turn():
    long, short = list(range(1000, 1400)), [list(range(100 * i, 100 * i + 31)) for i in range(1, 6)]
    rows = pack([long, *short], [0], num_rows=8, seq_len=32)
    assert [row[1] // 100 for row in rows.ids[:6]] == [10, 1, 2, 3, 4, 5]
    assert [row[1] for row in rows.ids[6:]] == [1031, 1062]
    assert rows.num_documents == 6


def test_a_book_fills_rows_in_its_order():
    rows = pack([list(range(1, 1001))], [0], num_rows=10, seq_len=32)
    assert [token for row in rows.ids for token in row if token] == list(range(1, 311))
    assert rows.num_documents == 1


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 63, 64, 65])
def test_documents_of_every_length_fill_rows(length):
    rows = pack([list(range(1, length + 1))] * 200, [0], num_rows=8, seq_len=32)
    assert len(rows.ids) == 8
    assert all(sum(lengths) == 32 for lengths in rows.pieces)


def test_pad_gives_each_document_a_row_cut_to_its_length(write, byte_tokenizer):
    path = write("d.jsonl", [{"text": "a" * 5}, {"text": "b" * 50}])
    calibration = load_calibration(CalibrationOptions(path, num_samples=2, seq_len=20, layout="pad"), byte_tokenizer, context=512)
    assert sorted(calibration.valid.sum(1).tolist()) == [6, 20]
    short = int(calibration.valid.sum(1).argmin())
    assert calibration.input_ids[short, 6:].tolist() == [2] * 14
    assert calibration.position_ids[short].tolist() == [*range(6), *range(14)]


def test_without_a_pad_token_eos_fills_rows_and_is_not_valid(write, tokenizer_factory):
    tokenizer = tokenizer_factory(pad=False)
    options = CalibrationOptions(write("d.jsonl", [{"text": "a"}]), num_samples=1, seq_len=8, layout="pad")
    calibration = load_calibration(options, tokenizer, context=512)
    assert calibration.input_ids[0, 2:].tolist() == [1] * 6
    assert calibration.valid[0].tolist() == [True, True] + [False] * 6


def test_the_seed_decides_and_nothing_else(write, byte_tokenizer):
    path = write("d.jsonl", documents(100))

    def load(seed: int):
        return load_calibration(CalibrationOptions(path, num_samples=8, seq_len=64, seed=seed), byte_tokenizer, context=512)

    assert load(0).fingerprint == load(0).fingerprint
    assert load(0).fingerprint != load(1).fingerprint


def test_split_holds_out_the_last_rows(write, byte_tokenizer):
    path = write("d.jsonl", documents(100))
    calibration = load_calibration(CalibrationOptions(path, num_samples=8, seq_len=64), byte_tokenizer, context=512)
    rest, held_out = calibration.split(3)
    assert torch.equal(torch.cat([rest.input_ids, held_out.input_ids]), calibration.input_ids)
    assert (rest.report.rows, held_out.report.rows, held_out.report.num_tokens) == (5, 3, 3 * 64)
    assert held_out.fingerprint != rest.fingerprint


def test_the_report_counts_what_was_used(write, byte_tokenizer):
    path = write("d.jsonl", [*documents(100), {"text": ""}, {"text": None}])
    calibration = load_calibration(CalibrationOptions(path, num_samples=8, seq_len=64), byte_tokenizer, context=512)
    report = calibration.report
    assert (report.rows, report.seq_len, report.num_tokens, report.dropped) == (8, 64, 512, {"empty": 2})
    assert 3 <= report.num_documents <= 8 and report.mean_document_length == 512 / report.num_documents
    assert "8 rows x 64 tokens" in report.summary() and "\n" not in report.summary()


def test_the_row_length_is_2048_or_the_models_context(write, byte_tokenizer):
    path = write("d.jsonl", documents(60))
    assert load_calibration(CalibrationOptions(path, num_samples=1), byte_tokenizer, context=300).report.seq_len == 300
    assert load_calibration(CalibrationOptions(path, num_samples=1), byte_tokenizer, context=10_000).report.seq_len == 2048
