"""Sampling against transformers' processors, against exact distributions, and against itself in other batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from quantkit.runtime import sampler
from quantkit.runtime.sampler import Sampled, SampleRequest, probabilities, sample, token_logprobs, uniform, verify
from quantkit.runtime.sampling_params import SamplingParams

VOCABULARY = 1237  # not a whole number of blocks
PROMPT, OUTPUT, EOS = [5, 9, 9, 700, 31], [44, 9, 44, 12, 44], frozenset({2, 3})
END_MASK = {"min_tokens": 6, "stop_token_ids": frozenset({11})}
EVERYTHING = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.5}

SETTINGS: dict[str, dict] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.7},
    "top_p nearly all": {"top_p": 0.999},
    "top_p hot": {"top_p": 0.9, "temperature": 5.0},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "bias": {"logit_bias": {4: 8.0, 700: -100.0}},
    "min_tokens": END_MASK,
    "bad_words": {"bad_words": ((7,), (44, 8), (31, 44))},
    "greedy": {"temperature": 0},
    "greedy changed": {"temperature": 0, "repetition_penalty": 1.5, **END_MASK},
    "everything": EVERYTHING,
}


def random_logits(rows: int, seed: int = 0, *, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def request(seed: int = 0, *, allowed: Tensor | None = None, output: list[int] = OUTPUT, **params: object) -> SampleRequest:
    return SampleRequest(SamplingParams(**params), PROMPT, output, seed, EOS, allowed)


def tokens(sampled: list[Sampled | None]) -> list[int | None]:
    return [each and each.token for each in sampled]


def processed(logits: Tensor, *processors: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The distribution transformers draws from behind these processors."""
    ids = torch.tensor([PROMPT + OUTPUT]).expand(len(logits), -1)
    for processor in processors:
        logits = processor(ids, logits)
    return logits.softmax(-1)



ORACLES: dict[str, tuple[dict, list]] = {
    "temperature": ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 17}, [hf.TopKLogitsWarper(17)]),
    "top_k of more than there are": ({"top_k": 5000}, [hf.TopKLogitsWarper(5000)]),
    "top_p 0.1": ({"top_p": 0.1}, [hf.TopPLogitsWarper(0.1)]),
    "top_p 0.9": ({"top_p": 0.9}, [hf.TopPLogitsWarper(0.9)]),
    "top_p 1": ({"top_p": 1.0}, []),
    "top_p tiny": ({"top_p": 1e-6}, [hf.TopPLogitsWarper(1e-6)]),
    "min_p": ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
    "min_p 1": ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
    "typical_p 0.2": ({"typical_p": 0.2}, [hf.TypicalLogitsWarper(0.2)]),
    "typical_p 0.95": ({"typical_p": 0.95}, [hf.TypicalLogitsWarper(0.95)]),
    "repetition": ({"repetition_penalty": 1.7}, [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition below 1": ({"repetition_penalty": 0.6}, [hf.RepetitionPenaltyLogitsProcessor(0.6)]),
    "bad words": (
        {"bad_words": ((7,), (44, 8), (12, 44, 600), (12, 45, 601), (44, 12, 44, 2))},
        [hf.NoBadWordsLogitsProcessor([[7], [44, 8], [12, 44, 600], [12, 45, 601], [44, 12, 44, 2]])],
    ),
    "bias": ({"logit_bias": {3: 5.0, 8: -2.5}}, [hf.SequenceBiasLogitsProcessor({(3,): 5.0, (8,): -2.5})]),
    "min_tokens": (END_MASK, [hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [2, 3, 11])]),
    "min_tokens reached": ({"min_tokens": 5}, [hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [2, 3])]),
    "filters in turn": (
        {"temperature": 1.4, "top_k": 100, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
        [
            hf.TemperatureLogitsWarper(1.4),
            hf.TopKLogitsWarper(100),
            hf.TopPLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.05),
            hf.TypicalLogitsWarper(0.9),
        ],
    ),
    "top_p and min_p": ({"top_p": 0.95, "min_p": 0.2}, [hf.TopPLogitsWarper(0.95), hf.MinPLogitsWarper(0.2)]),
    "changes and filters": (
        {"logit_bias": {9: 4.0}, "bad_words": ((44, 8),), "repetition_penalty": 1.3, "temperature": 0.7, "top_p": 0.9},
        [
            hf.SequenceBiasLogitsProcessor({(9,): 4.0}),
            hf.NoBadWordsLogitsProcessor([[44, 8]]),
            hf.RepetitionPenaltyLogitsProcessor(1.3),
            hf.TemperatureLogitsWarper(0.7),
            hf.TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_distribution_is_that_of_transformers(name: str) -> None:
    params, processors = ORACLES[name]
    logits = random_logits(16)

    ours = probabilities(logits, [request(**({"max_tokens": 99} | params))] * len(logits))

    theirs = processed(logits, *processors)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=2e-5)  # float32


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = random_logits(1)
    expected = logits.clone()
    for token, count in {44: 3, 9: 1, 12: 1}.items():
        expected[0, token] -= 0.5 + 0.25 * count

    ours = probabilities(logits, [request(presence_penalty=0.5, frequency_penalty=0.25)])

    torch.testing.assert_close(ours, expected.softmax(-1))


def test_bias_comes_before_the_penalty() -> None:
    logits = torch.zeros(1, 100)

    ours = probabilities(logits, [request(logit_bias={5: 2.0}, repetition_penalty=2.0)])

    assert math.isclose(ours[0, 5].item(), math.e / (math.e + 99), rel_tol=1e-5)


def test_tokens_without_a_logit_are_passed_over() -> None:
    logits = random_logits(1, vocabulary=50)

    ours = probabilities(logits, [request(max_tokens=99, repetition_penalty=2.0, min_tokens=9, stop_token_ids=frozenset({999}), bad_words=((888,),))])

    assert (ours > 0).sum() == 48


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 2000)
    logits[0, [3, 900, 1999]] = 1.0

    assert tokens(sample(logits, [request(temperature=0)])) == [3]
    assert tokens(sample(logits, [request(top_k=1)])) == [3]
    assert probabilities(logits, [request(top_k=2)])[0].nonzero().flatten().tolist() == [3, 900]
    assert probabilities(torch.zeros(1, 10), [request(top_p=0.45)])[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("vocabulary", [1, 7, 511, 512, 513, VOCABULARY])
def test_greedy_is_argmax_of_any_vocabulary(vocabulary: int) -> None:
    logits = random_logits(64, vocabulary=vocabulary).round()  # many ties

    assert tokens(sample(logits, [request(temperature=0)] * 64)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{"temperature": 1e-30}, {"temperature": 5e-324}, {"temperature": 1e-4, "top_p": 0.5}])
def test_temperature_near_zero_is_greedy(params: dict) -> None:
    logits = random_logits(8)

    assert tokens(sample(logits, [request(**params)] * 8)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, EVERYTHING], ids=["plain", "greedy", "everything"])
def test_mask_of_one_token_gives_it(params: dict) -> None:
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[1234] = True

    assert tokens(sample(random_logits(1), [request(allowed=allowed, **params)])) == [1234]


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, EVERYTHING, {"top_p": 0.5}], ids=["plain", "greedy", "everything", "top_p"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_row_that_is_not_finite_gives_none_and_harms_no_other(bad: float, params: dict) -> None:
    logits = random_logits(3)
    requests = [request(seed, logprobs=2, **params) for seed in range(3)]
    expected = sample(logits, requests)
    logits[1, slice(None) if bad == -torch.inf else 700] = bad

    assert sample(logits, requests) == [expected[0], None, expected[2]]
    assert probabilities(logits, requests).isnan().all(-1).tolist() == [False, True, False]


def test_row_of_which_masks_leave_nothing_gives_none() -> None:
    nothing = torch.zeros(VOCABULARY, dtype=torch.bool)

    for params in ({}, {"temperature": 0}, EVERYTHING):
        first, second = sample(random_logits(2), [request(allowed=nothing, **params), request(**params)])
        assert first is None and second is not None


def test_nan_behind_a_mask_is_still_seen() -> None:
    logits = random_logits(1)
    logits[0, 5] = torch.nan
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[5] = False

    assert sample(logits, [request(allowed=allowed)]) == [None]


def test_tokens_are_the_same_whatever_else_is_in_the_batch() -> None:
    logits = random_logits(4 * len(SETTINGS)).bfloat16().float()  # with ties
    params = list(SETTINGS.values()) * 4
    requests = [request(seed, max_tokens=99, logprobs=seed % 3, **each) for seed, each in enumerate(params)]
    together = sample(logits, requests)

    alone = [sample(logits[row : row + 1], requests[row : row + 1])[0] for row in range(len(requests))]
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], [requests[row] for row in order])

    assert alone == together
    assert shuffled == [together[row] for row in order]


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(len(SETTINGS))
    before = logits.clone()

    sample(logits, [request(max_tokens=99, **params) for params in SETTINGS.values()])

    assert torch.equal(logits, before)


def test_uniforms_are_those_of_seed_and_position() -> None:
    drawn = [uniform(seed, position, stream) for seed in (-1, 0, 1, 2**63) for position in range(2000) for stream in range(3)]

    assert uniform(7, 3) == uniform(7, 3)
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= each < 1 for each in drawn)
    assert abs(sum(drawn) / len(drawn) - 0.5) < 5 * math.sqrt(1 / 12 / len(drawn))


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standard deviations that the statistic lies above its mean; tokens of no probability must not occur."""
    assert not counts[expected == 0].any()
    likely = expected * counts.sum() >= 5
    counts = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]]).double() * counts.sum()
    freedom = len(counts) - 1
    return ((((counts - expected) ** 2) / expected.clamp(min=1e-9)).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 30, "min_p": 0.01}], ids=["plain", "top_p", "top_k"])
def test_tokens_are_drawn_as_often_as_they_are_probable(params: dict) -> None:
    logits, draws = random_logits(1), 4096
    counts = torch.zeros(VOCABULARY)
    for start in range(0, draws, 512):
        requests = [request(seed, **params) for seed in range(start, start + 512)]
        counts += torch.bincount(torch.tensor(tokens(sample(logits.expand(512, -1), requests))), minlength=VOCABULARY)

    assert chi_square(counts, probabilities(logits, [request(**params)])[0]) < 5


@pytest.mark.parametrize("vocabulary", [1, 512, VOCABULARY, 5000])
def test_draw_inverts_the_distribution_function(vocabulary: int) -> None:
    weights = random_logits(200, vocabulary=vocabulary).softmax(-1)
    if vocabulary > 600:
        weights[:, ::3] = weights[:100, :600] = 0  # the first block and many tokens have nothing
    uniforms = [0.0, 1 - 2**-53] + [uniform(row, 0) for row in range(198)]
    cdf = weights.double().cumsum(-1)
    at = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cdf[:, -1:]

    drawn = sampler._draw(weights, uniforms)[:, None]

    assert (weights.gather(1, drawn) > 0).all()
    upper = cdf.gather(1, drawn)
    slack = 1e-6  # float32 sums of blocks
    assert (at <= upper + slack).all() and (at >= upper - weights.gather(1, drawn) - slack).all()


TARGET = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.3, 0.3, 0.4], [0.25, 0.25, 0.0, 0.5]])
PROPOSED = torch.tensor([[0.8, 0.1, 0.1, 0.0], [0.6, 0.2, 0.1, 0.1]])


@pytest.mark.parametrize("proposed", [PROPOSED, None, TARGET[:2]], ids=["drawn draft", "n-gram draft", "perfect draft"])
def test_verifying_guesses_leaves_the_distribution_of_the_target(proposed: Tensor | None) -> None:
    """Counts whole outcomes: the first three tokens, drawing what verify does not give from the target."""
    draws, counts = 3000, torch.zeros(4, 4, 4)
    for seed in range(draws):
        if proposed is None:
            draft = [1, 3]
        else:
            uniforms = [sampler.draft_uniform(seed, position) for position in (7, 8)]
            draft = sampler._draw(proposed, uniforms).tolist()
        given = verify(TARGET, draft, proposed, seed=seed, position=7)
        assert given[:-1] == draft[: len(given) - 1]
        rest = [sampler._draw(TARGET[at : at + 1], [uniform(seed, 7 + at)]).item() for at in range(len(given), 3)]
        counts[tuple(given + rest)] += 1

    expected = TARGET[0][:, None, None] * TARGET[1][:, None] * TARGET[2]
    assert chi_square(counts.flatten(), expected.flatten()) < 5


def test_guesses_are_accepted_as_often_as_the_distributions_overlap() -> None:
    draws = 2000
    accepted = 0
    for seed in range(draws):
        draft = sampler._draw(PROPOSED[:1], [sampler.draft_uniform(seed, 0)]).tolist()
        accepted += len(verify(TARGET[:2], draft, PROPOSED[:1], seed=seed, position=0)) == 2

    overlap = torch.minimum(TARGET[0], PROPOSED[0]).sum().item()
    assert abs(accepted / draws - overlap) < 5 * math.sqrt(overlap * (1 - overlap) / draws)


def test_exact_residual_makes_up_the_target() -> None:
    for target, proposed in itertools.product(TARGET, PROPOSED):
        accepted = torch.minimum(target, proposed)
        residual = sampler._residual(target, proposed)
        torch.testing.assert_close(accepted + (1 - accepted.sum()) * residual / residual.sum(), target)


@pytest.mark.parametrize("name", SETTINGS)
def test_ngram_guesses_give_the_tokens_that_sampling_gives(name: str) -> None:
    """Every row is a step of one sequence; guesses are right up to a place, then wrong."""
    logits, params = random_logits(5, seed=3), {"max_tokens": 99} | SETTINGS[name]
    expected: list[int] = []
    for step in range(5):
        expected += tokens(sample(logits[step : step + 1], [request(11, output=OUTPUT + expected, **params)]))
    for right in range(5):
        draft = expected[:right] + [(token + 1) % VOCABULARY for token in expected[right:4]]
        requests = [request(11, output=OUTPUT + draft[:at], **params) for at in range(5)]

        given = verify(probabilities(logits, requests), draft, None, seed=11, position=len(OUTPUT))

        assert given == expected[: right + 1]


def test_verify_gives_none_where_it_comes_to_a_row_of_nan() -> None:
    target = TARGET.clone()
    target[1] = torch.nan

    assert verify(target, [3, 0], None, seed=0, position=0) is not None  # falls before
    assert verify(torch.eye(4)[[1, 2, 3]].index_fill(0, torch.tensor([1]), torch.nan), [1, 2], None, seed=0, position=0) is None


def test_logprobs_are_those_of_raw_logits() -> None:
    logits = random_logits(6)
    requests = [request(seed, logprobs=3, repetition_penalty=1.9, temperature=seed * 0.5) for seed in range(5)] + [request(5)]

    sampled = sample(logits, requests)

    expected = logits.log_softmax(-1)
    for row, each in zip(expected[:5], sampled[:5], strict=True):
        values, ids = row.topk(3)
        assert each.logprobs.token == each.token
        assert each.logprobs.logprob == row[each.token].item()
        assert each.logprobs.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))
        assert each.logprobs.rank == 1 + (row > row[each.token]).sum().item()
    assert sampled[5].logprobs is None


@pytest.mark.parametrize("num_top", [0, 5, 100])
def test_logprobs_do_not_depend_on_the_parts_they_are_taken_in(monkeypatch: pytest.MonkeyPatch, num_top: int) -> None:
    logits = random_logits(7, vocabulary=63)
    chosen = torch.arange(7)
    whole = token_logprobs(logits, chosen, num_top)

    monkeypatch.setattr(sampler, "LOGPROBS_BYTES", 2 * 63 * 4)

    assert token_logprobs(logits, chosen, num_top) == whole
    assert {len(each.top) for each in whole} == {min(num_top, 63)}


def test_most_likely_token_leads_its_ties() -> None:
    logits = torch.zeros(1, 1000)

    (each,) = sample(logits, [request(temperature=0, logprobs=2)])

    assert (each.token, each.logprobs.rank, [token for token, _ in each.logprobs.top]) == (0, 1, [0, 1])


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []
