"""The scheduler alone, with tokens made up: budgets, order, fairness, preemption, forks; and random traces under which nothing may leak or starve."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import RequestError
from quantkit.runtime.block_pool import BlockPool
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.scheduler import Batch, Scheduler, SchedulerConfig
from quantkit.runtime.sequence import Sequence

NUM_TRACES = int(os.environ.get("QUANTKIT_TRACES", "500"))


def scheduler(num_blocks: int = 64, block_size: int = 4, *, aging: int = 1000, caching: bool = True, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size, caching=caching), SchedulerConfig(**{"context": 256} | limits), aging=aging)


def sequence(name: str, length: int = 8, *, max_tokens: int = 4, tokens: list[int] | None = None, **settings: object) -> Sequence:
    prompt = tokens or [hash((name, i)) % 1000 for i in range(length)]
    return Sequence(name, list(prompt), SamplingParams(max_tokens=max_tokens), **settings)


def run(scheduler: Scheduler, batch: Batch, token: int = 7) -> None:
    """What the engine does with a batch, with a model that knows one token."""
    for piece in batch.pieces:
        known = piece.sequence
        forked = scheduler.commit(piece, [token] if piece.reaches_end else [])
        for sibling in forked:
            sibling.tokens.append(token)
        for each in (known, *forked):
            if each.num_output >= (each.params.max_tokens or 10**9) or len(each.tokens) >= scheduler.max_length:
                scheduler.finish(each, "length")


def parts(batch: Batch) -> dict[str, tuple[int, int]]:
    return {piece.sequence.id: (piece.start, piece.count) for piece in batch.pieces}


def test_a_long_prompt_is_computed_in_chunks_beside_one_that_decodes() -> None:
    plan = scheduler(max_tokens=10)
    plan.add(sequence("short", 4))
    run(plan, plan.schedule())
    plan.add(sequence("long", 20))

    seen = []
    for _ in range(3):
        batch = plan.schedule()
        seen.append(parts(batch))
        run(plan, batch)

    assert seen == [{"short": (4, 1), "long": (0, 9)}, {"short": (5, 1), "long": (9, 9)}, {"short": (6, 1), "long": (18, 2)}]


def test_a_chunk_limit_leaves_budget_to_others() -> None:
    plan = scheduler(max_tokens=10, max_chunk=6)
    plan.add(sequence("a", 20))
    plan.add(sequence("b", 20))

    assert parts(plan.schedule()) == {"a": (0, 6), "b": (0, 4)}


def test_no_more_sequences_run_than_may() -> None:
    plan = scheduler(max_sequences=2)
    for name in "abc":
        plan.add(sequence(name))

    assert set(parts(plan.schedule())) == {"a", "b"}


def test_requests_start_in_the_order_of_arrival_and_by_priority_before_that() -> None:
    plan = scheduler(max_sequences=1)
    for name, priority in (("first", 0), ("second", 0), ("urgent", -1), ("late", 1)):
        plan.add(sequence(name, priority=priority, max_tokens=1))

    started = []
    while plan.has_work:
        batch = plan.schedule()
        started += parts(batch)
        run(plan, batch)

    assert started == ["urgent", "first", "second", "late"]


def test_waiting_raises_a_request_to_the_most_urgent_that_waits() -> None:
    plan = scheduler(max_sequences=1, aging=5)
    plan.add(sequence("patient", priority=3, max_tokens=1))
    started = []
    for i in range(40):
        plan.add(sequence(f"urgent{i}", priority=0, max_tokens=1))
        batch = plan.schedule()
        started += parts(batch)
        run(plan, batch)

    assert started.index("patient") < 30


def test_tenants_get_equal_shares_whatever_they_queue() -> None:
    plan = scheduler(max_sequences=1, caching=False)
    for i in range(30):
        plan.add(sequence(f"greedy{i}", tenant="greedy", max_tokens=1))
    started = []
    for step in range(20):
        if step == 5:
            for i in range(10):
                plan.add(sequence(f"modest{i}", tenant="modest", max_tokens=1))
        batch = plan.schedule()
        started += parts(batch)
        run(plan, batch)

    assert Counter(name.rstrip("0123456789") for name in started[5:15]) == {"greedy": 5, "modest": 5}


def test_a_shared_prefix_is_computed_once() -> None:
    plan = scheduler()
    prompt = list(range(11))
    plan.add(sequence("a", tokens=prompt, max_tokens=1))
    run(plan, plan.schedule())

    plan.add(sequence("b", tokens=[*prompt, 99], max_tokens=1))

    assert parts(plan.schedule()) == {"b": (8, 4)}


def test_the_last_token_is_computed_even_when_everything_is_cached() -> None:
    plan = scheduler()
    prompt = list(range(8))
    for name in "ab":
        plan.add(sequence(name, tokens=prompt, max_tokens=1))
        batch = plan.schedule()
        run(plan, batch)

    assert parts(batch) == {"b": (4, 4)}


@pytest.mark.parametrize("difference", ["salt", "prompt_logprobs"])
def test_other_salts_and_prompts_whose_logits_are_wanted_find_nothing(difference: str) -> None:
    plan = scheduler()
    prompt = list(range(12))
    plan.add(sequence("a", tokens=prompt, max_tokens=1))
    run(plan, plan.schedule())
    other = sequence("b", tokens=prompt, salt="other" if difference == "salt" else "")
    other.params = SamplingParams(prompt_logprobs=0) if difference == "prompt_logprobs" else other.params

    plan.add(other)

    assert parts(plan.schedule()) == {"b": (0, 12)}


def test_when_blocks_run_out_the_last_gives_its_own_back_and_is_computed_again() -> None:
    plan = scheduler(num_blocks=5, caching=False)
    plan.add(sequence("first", 8, max_tokens=6))
    plan.add(sequence("last", 8, max_tokens=6))
    ended: dict[str, list[int]] = {}
    sequences = list(plan.waiting)
    while plan.has_work:
        run(plan, plan.schedule())

    for each in sequences:
        ended[each.id] = each.output
    assert ended == {"first": [7] * 6, "last": [7] * 6}
    assert [s.num_preemptions for s in sorted(sequences, key=lambda s: s.id)] == [0, 1]
    plan.pool.check()
    assert plan.pool.num_used == 0


def test_continuations_share_the_prompt_and_part_where_they_write() -> None:
    plan = scheduler()
    siblings = [sequence(f"s{i}", tokens=list(range(6))) for i in (1, 2)]
    leader = sequence("s0", tokens=list(range(6)), siblings=siblings)
    plan.add(leader)
    batch = plan.schedule()
    assert parts(batch) == {"s0": (0, 6)}
    run(plan, batch)
    assert plan.pool.num_used == 2

    batch = plan.schedule()

    assert parts(batch) == {"s0": (6, 1), "s1": (6, 1), "s2": (6, 1)}
    assert len(batch.copies) == 2 and len({new for _, new in batch.copies}) == 2
    assert len({s.blocks[0] for s in (leader, *siblings)}) == 1 and len({s.blocks[1] for s in (leader, *siblings)}) == 3


def test_guesses_are_computed_with_the_rest_and_only_those_that_held_are_kept() -> None:
    plan = scheduler()
    plan.add(sequence("a", 4, max_tokens=20))
    run(plan, plan.schedule())
    (running,) = plan.running
    running.draft = [7, 7, 8]

    (piece,) = plan.schedule().pieces
    assert (piece.start, piece.count, piece.tokens) == (4, 4, [7, 7, 7, 8])
    plan.commit(piece, [7, 7, 9])

    assert running.output == [7, 7, 7, 9] and running.num_computed == 7 and running.draft == []


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [(0, 4, "prompt is empty"), (250, 10, "250 tokens of prompt and 10 to .* than the context of 256"), (40, 30, "never fit the KV cache")],
)
def test_what_can_never_run_is_refused_at_once(length: int, max_tokens: int, message: str) -> None:
    plan = scheduler(num_blocks=16)
    asked = Sequence("a", list(range(length)), SamplingParams(max_tokens=max_tokens))

    with pytest.raises(RequestError, match=message):
        plan.add(asked)

    assert not plan.has_work


def test_a_full_queue_refuses() -> None:
    plan = scheduler(max_waiting=1)
    plan.add(sequence("a"))

    with pytest.raises(RequestError, match="the queue takes 1"):
        plan.add(sequence("b"))


def test_a_sequence_that_fills_the_whole_pool_ends_there() -> None:
    plan = scheduler(num_blocks=3, context=1000)
    endless = sequence("a", 4)
    endless.params = SamplingParams(max_tokens=None)
    plan.add(endless)
    while plan.has_work:
        run(plan, plan.schedule())

    assert len(endless.tokens) == 12 and endless.finish_reason == "length"


@settings(max_examples=NUM_TRACES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 24), block_size=st.integers(1, 5), max_tokens=st.integers(1, 24))
def test_no_trace_leaks_a_block_or_starves_a_request(seed: int, num_blocks: int, block_size: int, max_tokens: int) -> None:
    dice = random.Random(seed)
    limits = {"max_tokens": max_tokens, "max_sequences": dice.randint(4, 8), "max_chunk": dice.choice([1, 3, 100])}
    plan = scheduler(num_blocks, block_size, aging=dice.choice([3, 1000]), caching=dice.random() < 0.8, **limits)
    added: list[Sequence] = []
    for step in range(30):
        for _ in range(dice.choice([0, 0, 1, 2])):
            added += arrive(plan, dice, f"{step}.{len(added)}")
        if added and dice.random() < 0.1:
            plan.finish(dice.choice(added), "cancelled")
        advance(plan, dice)
    spent = 0
    while plan.has_work:
        advance(plan, dice)
        spent += 1
        assert spent < 20_000, "a request starves"

    assert all(each.is_finished for each in added)
    assert plan.pool.num_used == 0


def arrive(plan: Scheduler, dice: random.Random, name: str) -> list[Sequence]:
    """A request that shares beginnings with others, in a few continuations."""
    prompt = [dice.randint(0, 1) for _ in range(dice.randint(1, 20))]
    params = SamplingParams(max_tokens=dice.randint(1, 12))
    siblings = [Sequence(f"{name}s{i}", list(prompt), params) for i in range(dice.choice([0, 0, 0, 1, 2]))]
    priority, tenant = dice.choice([0, 0, 1, 2]), dice.choice("ab")
    leader = Sequence(name, prompt, params, siblings=list(siblings), priority=priority, tenant=tenant, salt=dice.choice(["", "x"]))
    for each in siblings:
        each.priority, each.tenant, each.salt = priority, tenant, leader.salt
    try:
        plan.add(leader)
    except RequestError:
        return []
    return [leader, *siblings]


def advance(plan: Scheduler, dice: random.Random) -> None:
    batch = plan.schedule()
    check(plan, batch)
    run(plan, batch, token=dice.randint(0, 1))
    check(plan, Batch())
    for each in plan.running:
        each.draft = [dice.randint(0, 1) for _ in range(dice.choice([0, 0, 2]))] if each.num_wanted == 1 else []


def check(plan: Scheduler, batch: Batch) -> None:
    pool = plan.pool
    pool.check()
    free = pool.num_idle - pool.num_cached
    assert free + pool.num_cached + pool.num_used == len(pool)
    holders = Counter(block for each in plan.running for block in each.blocks)
    assert {block: pool._blocks[block].references for block in holders} == dict(holders) and len(holders) == pool.num_used
    assert batch.num_tokens <= plan.config.max_tokens and len(plan.running) <= plan.config.max_sequences
    for piece in batch.pieces:
        touched = {piece.sequence.blocks[at // pool.block_size] for at in range(piece.start, piece.end)}
        assert not any(pool.is_shared(block) for block in touched), "a shared block is written"
        assert len(piece.sequence.blocks) * pool.block_size >= piece.end
