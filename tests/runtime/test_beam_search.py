"""Beam search is transformers' with the same settings, over requests of one token each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.errors import RequestError
from quantkit.runtime.llm import LLM
from tests.conversion.conftest import save_tiny
from tests.runtime.test_engine import engine


@torch.no_grad()
def by_transformers(
    folder: Path, prompt: list[int], width: int, max_tokens: int, length_penalty: float, end: int = 1
) -> tuple[list[list[int]], list[float]]:
    """All beams without the padding behind their end, and their scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width, num_return_sequences=width,
        do_sample=False, max_new_tokens=max_tokens, length_penalty=length_penalty, output_scores=True, return_dict_in_generate=True, pad_token_id=2,
    )  # fmt: skip
    beams = [row[len(prompt) :] for row in out.sequences.tolist()]
    return [beam[: beam.index(end) + 1] if end in beam else beam for beam in beams], out.sequences_scores.tolist()


@pytest.fixture(scope="module")
def llm(reference: Path) -> LLM:
    return engine(reference)


@pytest.mark.parametrize(("width", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (5, 0.0), (3, 2.0), (3, -1.0)])
def test_beams_are_those_of_transformers(width: int, length_penalty: float, llm: LLM, reference: Path, prompts: list[list[int]]) -> None:
    for prompt in prompts[4:8]:
        expected, scores = by_transformers(reference, prompt, width, 14, length_penalty) if width > 1 else (None, None)

        found = llm.beam_search(prompt, width=width, max_tokens=14, length_penalty=length_penalty)

        if width == 1:
            assert list(found[0].token_ids) == llm.generate(prompt, max_tokens=14, temperature=0)[0].completions[0].token_ids
            continue
        assert [list(beam.token_ids) for beam in found] == expected
        assert [beam.score for beam in found] == pytest.approx(scores, abs=1e-4, rel=1e-5)
    assert llm.engine.stats.num_cached_tokens > 0 and llm.engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_beams_that_end_early_are_those_of_transformers(length_penalty: float, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short", vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    usual = Counter(token for beam in engine(folder).beam_search([3, 5, 3], width=3, max_tokens=10) for token in beam.token_ids)
    ((end, _),) = usual.most_common(1)
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {"eos_token_id": end}))
    llm, early = engine(folder), 0
    for start in range(3, 8):
        expected, scores = by_transformers(folder, [start, 5, start], 3, 10, length_penalty, end=end)

        found = llm.beam_search([start, 5, start], width=3, max_tokens=10, length_penalty=length_penalty)

        assert [list(beam.token_ids) for beam in found] == expected
        assert [beam.score for beam in found] == pytest.approx(scores, abs=1e-4, rel=1e-5)
        early += sum(len(beam.token_ids) < 10 for beam in found)
    assert early > 0


def test_a_beam_has_its_text(llm: LLM) -> None:
    (best, *_) = llm.beam_search("Once upon a time", width=3, max_tokens=8)

    assert best.text == llm.engine.tokenizer.decode([*llm.engine.encode("Once upon a time"), *best.token_ids], skip_special_tokens=True)[16:]


REFUSED = {
    "too wide": ({"width": 51}, r"width is 51; give at least 1 and at most \d+"),
    "no width": ({"width": 0}, "width is 0"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "too long": ({"max_tokens": 1024}, "2 tokens of prompt and 1024 to generate are more than the 1024 that fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused(case: str, llm: LLM) -> None:
    settings, message = REFUSED[case]

    with pytest.raises(RequestError, match=message):
        llm.beam_search([5, 6], **settings)
