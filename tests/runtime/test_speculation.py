"""Guessing ahead: the same greedy tokens and the same distribution as without it, whoever guesses and whatever happens to the sequence meanwhile."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.errors import UsageError
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.scheduler import Piece
from quantkit.runtime.sequence import Sequence
from quantkit.runtime.speculation import Draft, guess, look_up
from tests.conversion.conftest import edit_tensors, save_tiny
from tests.runtime.test_engine import CUTS, engine, greedy
from tests.runtime.test_scheduler import run, scheduler, sequence

NUM_PROMPTS, NUM_TOKENS = 6, 16
BLOCK_BYTES = 6 * 2 * 16 * 2 * 64 * 4
TINY_BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4


@pytest.fixture(scope="module")
def small(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model in 3 bits, which guesses worse than it."""
    folder = tmp_path_factory.mktemp("small") / "out"
    convert(str(reference), folder, ConvertOptions(recipe="w4a16-rtn", overrides=(".*=w3a16",), measure=False))
    return folder


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    """Real beginnings, some of them told twice so that there is something to look up."""
    return [prompt * (1 + i % 2) for i, prompt in enumerate(prompts[:NUM_PROMPTS])]


@pytest.fixture(scope="module")
def whole(reference: Path, texts: list[list[int]]) -> list[list[int]]:
    return greedy(engine(reference), texts, NUM_TOKENS)


def proposer(name: str, small: Path) -> str:
    return name if name == "ngram" else str(small)


LOOKED_UP: dict[str, tuple[list[int], list[int]]] = {
    "what followed": ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1]),
    "the longest": ([7, 1, 2, 5, 0, 1, 2, 6, 0, 7, 1, 2], [5, 0, 1]),
    "the latest": ([1, 2, 5, 1, 2, 6, 0, 1, 2], [6, 0, 1]),
    "a repetition goes on": ([8, 5, 6, 5, 6], [5, 6, 5]),
    "one token repeated": ([8, 5, 5, 5], [5, 5, 5]),
    "nothing": ([1, 2, 3, 4, 5, 2], []),
    "too short": ([1], []),
    "no match across the bytes of two tokens": ([256, 0, 0, 1, 0], []),
}


@pytest.mark.parametrize("case", LOOKED_UP)
def test_an_ngram_is_looked_up(case: str) -> None:
    tokens, expected = LOOKED_UP[case]

    assert look_up(tokens, 3) == expected


@pytest.mark.parametrize("name", ["ngram", "a model"])
@pytest.mark.parametrize("cut", ["whole", *CUTS])
def test_greedy_tokens_are_those_without_guesses(
    cut: str, name: str, reference: Path, small: Path, texts: list[list[int]], whole: list[list[int]]
) -> None:
    options = dict(CUTS.get(cut, {}))
    if "preempted" in cut:
        options["kv_cache_memory"] = BLOCK_BYTES * 9 * (1 if name == "ngram" else 2)
    llm = engine(reference, speculation=proposer(name, small), num_draft_tokens=5, **options)

    assert greedy(llm, texts, NUM_TOKENS) == whole
    stats = llm.engine.stats
    assert stats.num_accepted <= stats.num_drafted and stats.num_generated_tokens == NUM_PROMPTS * NUM_TOKENS
    assert (stats.num_accepted > 0) == ("one token" not in cut)
    if "preempted" in cut:
        assert llm.engine.scheduler.num_preemptions > 0
    llm.engine.scheduler.pool.check()
    assert llm.engine.scheduler.pool.num_used == 0


def test_ngrams_give_the_very_tokens_of_a_seed(reference: Path, texts: list[list[int]]) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 24, "temperature": 0.6, "seed": 3, "ignore_eos": True, "n": 2,
        "repetition_penalty": 1.1, "frequency_penalty": -1.0, "min_tokens": 9,
    }  # fmt: skip
    plain, guessing = engine(reference), engine(reference, speculation="ngram")

    expected, found = (llm.generate(texts, logprobs=2, prompt_logprobs=1, **settings) for llm in (plain, guessing))

    assert [[c.token_ids for c in out.completions] for out in found] == [[c.token_ids for c in out.completions] for out in expected]
    assert guessing.engine.stats.num_accepted > 0
    for a, b in zip(expected, found, strict=True):
        assert [p and p.token for p in a.prompt_logprobs] == [p and p.token for p in b.prompt_logprobs]
        mine, theirs = ([entry.logprob for c in out.completions for entry in c.logprobs] for out in (a, b))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_model_itself_guesses_right(temperature: float, reference: Path, texts: list[list[int]]) -> None:
    llm = engine(reference, speculation=str(reference), kv_cache_memory=32 << 20)

    llm.generate(texts, max_tokens=NUM_TOKENS, temperature=temperature, top_p=0.95, presence_penalty=0.5, ignore_eos=True, seed=1)

    assert llm.engine.stats.acceptance > 0.98
    assert llm.engine.stats.num_steps < NUM_TOKENS / 3


def test_log_probabilities_of_accepted_guesses_are_those_of_their_tokens(reference: Path, small: Path, texts: list[list[int]]) -> None:
    llm = engine(reference, speculation=str(small))

    (out,) = llm.generate(texts[3], max_tokens=20, temperature=0.5, seed=1, logprobs=1, ignore_eos=True)

    again = engine(reference).generate(texts[3] + out.completions[0].token_ids, max_tokens=1, prompt_logprobs=1)[0].prompt_logprobs[-20:]
    assert llm.engine.stats.num_accepted > 0
    assert [entry.token for entry in out.completions[0].logprobs] == out.completions[0].token_ids == [entry.token for entry in again]
    for mine, theirs in zip(out.completions[0].logprobs, again, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


VOCABULARY, NUM_DRAWS = 8, 1500


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of 8 tokens whose distributions are far from even and far apart."""
    folder = tmp_path_factory.mktemp("pair")

    def sharpen(tensors: dict[str, torch.Tensor], seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        for name, value in tensors.items():
            if "norm" not in name:
                tensors[name] = torch.randn(value.shape, generator=draws).to(value.dtype) * 0.15

    made = [save_tiny(folder / str(seed), vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=None) for seed in (1, 2)]
    for seed, model in enumerate(made):
        edit_tensors(model, lambda tensors, seed=seed: sharpen(tensors, seed))
    return made[0], made[1]


@torch.no_grad()
def true_pairs(folder: Path, prompt: list[int], bias: dict[int, float]) -> torch.Tensor:
    """Probabilities [V * V] of the second and third token behind a prompt, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    continuations = torch.tensor(list(product(range(VOCABULARY), repeat=2)))
    ids = torch.cat([torch.tensor([prompt]).expand(len(continuations), -1), continuations], 1)
    logits = model(ids).logits[:, len(prompt) - 1 :].double()
    for token, value in bias.items():
        logits[..., token] += value
    steps = logits.softmax(-1)  # [V * V, 3, V]
    first, second = continuations.T
    rows = torch.arange(len(ids))
    joint = (steps[rows, 0, first] * steps[rows, 1, second])[:, None] * steps[:, 2]  # [V * V, V]
    return joint.reshape(VOCABULARY, -1).sum(0)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, cells of fewer than 5 taken together."""
    rare = expected < 5
    a = torch.cat([counts[~rare], counts[rare].sum()[None]])
    b = torch.cat([expected[~rare], expected[rare].sum()[None]])
    a, b = a[b > 0], b[b > 0]
    return float(((a - b) ** 2 / b).sum()), len(a) - 1


@pytest.mark.parametrize("speculation", ["ngram", "a model"])
def test_the_distribution_is_that_of_the_model_alone(speculation: str, pair: tuple[Path, Path]) -> None:
    target, draft = pair
    prompt, bias = [3, 4, 5, 2, 3, 4, 5, 2, 3, 4], {6: 0.5}
    llm = engine(target, speculation="ngram" if speculation == "ngram" else str(draft), num_draft_tokens=3, max_sequences=64)

    outs = llm.generate([prompt] * NUM_DRAWS, max_tokens=6, temperature=1.0, logit_bias=bias, ignore_eos=True)

    assert 0.02 < llm.engine.stats.acceptance < 0.9
    drawn = torch.tensor([out.completions[0].token_ids[1] * VOCABULARY + out.completions[0].token_ids[2] for out in outs])
    counts = drawn.bincount(minlength=VOCABULARY**2).double()
    of_target, of_draft = (chi_square(counts, true_pairs(model, prompt, bias) * NUM_DRAWS) for model in pair)
    assert of_target[0] < of_target[1] + 4 * (2 * of_target[1]) ** 0.5
    assert of_draft[0] > 5 * of_draft[1]


SAMPLED = [
    SamplingParams(max_tokens=26, temperature=temperature, top_p=top_p, seed=seed, ignore_eos=True)
    for seed, (temperature, top_p) in enumerate([(1.0, 1.0), (0.7, 0.95), (1.3, 0.9), (0.3, 1.0), (1.0, 0.8), (2.0, 1.0), (0, 1.0)])
]
STARTS = [[3 + (5 * i + row) % 5 for i in range(4 + 3 * row)] for row in range(len(SAMPLED))]


def sampled(llm: LLM, rows: list[int]) -> list[list[int]]:
    outputs = [llm.engine.add(STARTS[row], SAMPLED[row], request_id=str(row)) for row in rows]
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.scheduler.pool.check()
    return [out.completions[0].token_ids for out in outputs]


@pytest.fixture(scope="module")
def alone(pair: tuple[Path, Path]) -> dict[str, list[list[int]]]:
    """What each request gives by itself, by who guesses: another model, or the model itself."""
    llms = {name: engine(pair[0], speculation=str(draft)) for name, draft in (("bad", pair[1]), ("good", pair[0]))}
    found = {name: [sampled(llm, [row])[0] for row in range(len(SAMPLED))] for name, llm in llms.items()}
    assert [llm.engine.stats.acceptance > 0.9 for llm in llms.values()] == [False, True]
    return found


@hypothesis.settings(max_examples=int(os.environ.get("QUANTKIT_TRACES", "500")) // 20, deadline=None)
@hypothesis.given(
    who=st.sampled_from(["bad", "good"]), rows=st.lists(st.integers(0, len(SAMPLED) - 1), min_size=1, unique=True),
    max_tokens_per_step=st.one_of(st.integers(1, 24), st.just(2048)), max_chunk=st.one_of(st.none(), st.integers(1, 9)),
    max_sequences=st.integers(1, 7), num_blocks=st.integers(4, 12), prefix_caching=st.booleans(),
)  # fmt: skip
def test_a_seed_gives_the_same_tokens_in_any_company_and_however_it_is_cut_up(
    who: str, rows: list[int], num_blocks: int, pair: tuple[Path, Path], alone: dict[str, list[list[int]]], **options: Any
) -> None:
    """Chunks and small steps leave no room for guesses that are due, and few blocks preempt."""
    draft = pair[1] if who == "bad" else pair[0]
    llm = engine(pair[0], speculation=str(draft), kv_cache_memory=num_blocks * 2 * TINY_BLOCK_BYTES, **options)

    assert sampled(llm, rows) == [alone[who][row] for row in rows]


def test_preempted_requests_keep_the_tokens_of_their_seeds(pair: tuple[Path, Path], alone: dict[str, list[list[int]]]) -> None:
    llm = engine(pair[0], speculation=str(pair[1]), kv_cache_memory=6 * 2 * TINY_BLOCK_BYTES, max_tokens_per_step=9)

    assert sampled(llm, list(range(len(SAMPLED)))) == alone["bad"]
    assert llm.engine.scheduler.num_preemptions > 2 and llm.engine.stats.num_accepted > 0


def test_a_draft_that_is_never_right_costs_few_guesses(reference: Path, texts: list[list[int]], whole: list[list[int]]) -> None:
    class Wrong:
        def propose(self, sequences: list[Sequence]) -> list[Draft]:
            return [Draft([5] * each.num_guesses) for each in sequences]

    llm = engine(reference, speculation="ngram")
    llm.engine.proposer = Wrong()

    (out,) = llm.generate(texts[0], max_tokens=120, temperature=0, ignore_eos=True)

    assert 5 not in out.completions[0].token_ids[1:]
    assert 0 < llm.engine.stats.num_drafted < 18


def test_what_was_accepted_behind_an_end_is_dropped(reference: Path, texts: list[list[int]], whole: list[list[int]]) -> None:
    plain, guessing = engine(reference), engine(reference, speculation=str(reference), num_draft_tokens=6)
    for row, place in ((1, 5), (2, 8), (3, 9)):
        stop = {"stop_token_ids": [whole[row][place]]}
        for settings in (stop, stop | {"min_tokens": place + 3}, {"max_tokens": place}):
            expected, found = (llm.generate(texts[row], **{"max_tokens": 24, "temperature": 0} | settings)[0] for llm in (plain, guessing))

            assert found.completions == expected.completions
    assert guessing.engine.scheduler.pool.num_used == 0


def test_a_stop_string_within_guesses_cuts_the_text(reference: Path) -> None:
    text = "Once upon a time there was a dog. Once upon a time there was a dog. Once upon"
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True, "stop": "was a"}

    expected, found = (engine(reference, speculation=by).generate(text, **settings)[0] for by in (None, str(reference)))

    assert found.completions == expected.completions


def test_the_context_is_filled_to_its_last_token(reference: Path, texts: list[list[int]]) -> None:
    prompt = texts[1]
    context = len(prompt) + 13

    for by in (None, "ngram", str(reference)):
        (out,) = engine(reference, speculation=by, context=context).generate(prompt, max_tokens=None, temperature=0, ignore_eos=True)
        assert (len(out.completions[0].token_ids), out.completions[0].finish_reason) == (13, "length")


@pytest.mark.parametrize("name", ["ngram", "a model"])
def test_cancelling_one_leaves_the_others_as_they_are(
    name: str, reference: Path, small: Path, texts: list[list[int]], whole: list[list[int]]
) -> None:
    llm = engine(reference, speculation=proposer(name, small))
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    outputs = [llm.engine.add(text, params, request_id=str(i)) for i, text in enumerate(texts)]
    for _ in range(3):
        llm.engine.step()

    llm.engine.cancel("1")
    while llm.engine.has_work:
        llm.engine.step()

    assert [out.completions[0].token_ids for i, out in enumerate(outputs) if i != 1] == [tokens for i, tokens in enumerate(whole) if i != 1]
    assert outputs[1].completions[0].finish_reason == "cancelled"
    if name != "ngram":
        inner = llm.engine.proposer.scheduler
        inner.pool.check()
        assert inner.pool.num_used == 0 and not inner.has_work


def test_a_draft_whose_context_is_shorter_stops_guessing(reference: Path, tmp_path: Path) -> None:
    draft = save_tiny(tmp_path / "draft", max_position_embeddings=16)
    target = save_tiny(tmp_path / "target", max_position_embeddings=64)
    prompt = [5, 6, 7, 8]

    plain, guessing = engine(target), engine(target, speculation=str(draft))

    assert greedy(guessing, [prompt], 40) == greedy(plain, [prompt], 40)
    assert 0 < guessing.engine.stats.num_drafted <= 12 * 4


def test_a_draft_that_goes_wrong_costs_its_guesses_only(
    reference: Path, small: Path, texts: list[list[int]], whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(reference, speculation=str(small))
    forward = llm.engine.proposer.runner.forward

    def poisoned(batch: Any) -> Any:
        logits, wanted = forward(batch)
        return torch.full_like(logits, torch.nan), wanted

    monkeypatch.setattr(llm.engine.proposer.runner, "forward", poisoned)

    assert greedy(llm, texts, NUM_TOKENS) == whole
    assert llm.engine.stats.num_drafted == 0


def test_another_vocabulary_is_refused_by_name(reference: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")

    with pytest.raises(UsageError, match=r"other cannot draft for reference: their vocabularies differ \(\d+ tokens against 4,096\)"):
        LLM("reference", speculation=str(other))


def test_no_guesses_are_no_option(reference: Path) -> None:
    with pytest.raises(UsageError, match="num_draft_tokens is 0"):
        LLM(str(reference), speculation="ngram", num_draft_tokens=0)


class Nine:
    """Guesses 9, as often as it may."""

    def propose(self, sequences: list[Sequence]) -> list[Any]:
        return [Draft([9] * 6) for _ in sequences]


def test_guesses_push_nobody_out() -> None:
    plan = scheduler(num_blocks=4, block_size=4)
    for name in "ab":
        plan.add(sequence(name, 7, max_tokens=2))
    run(plan, plan.schedule())

    guess(Nine(), plan)
    for each in plan.running:
        each.draft = [9] * 6
    batch = plan.schedule()

    assert not batch.preempted
    assert [(piece.count, piece.guesses) for piece in batch.pieces] == [(1, []), (1, [])]


def test_guesses_take_what_known_tokens_leave_of_a_step() -> None:
    plan = scheduler(max_tokens=12)
    for name in "abc":
        plan.add(sequence(name, 3, max_tokens=20))
    run(plan, plan.schedule())
    plan.running[2].tokens += [1, 2]

    guess(Nine(), plan)

    assert [len(each.draft) for each in plan.running] == [3, 3, 0]
    assert sum(piece.count for piece in plan.schedule().pieces) == 11


def test_as_many_are_guessed_as_may_follow() -> None:
    plan = scheduler()
    plan.add(sequence("a", 5, max_tokens=4))
    run(plan, plan.schedule())

    guess(Nine(), plan)

    assert plan.running[0].draft == [9, 9]
    (piece,) = plan.schedule().pieces
    assert isinstance(piece, Piece) and piece.tokens == [7, 9, 9] and piece.guesses == [9, 9]
