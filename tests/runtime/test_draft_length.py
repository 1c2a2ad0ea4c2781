"""How far ahead a sequence is guessed: as far as its guesses hold, hardly at all where they do not, and by nothing but its own history."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.runtime.draft_length import DraftLength


def grow(length: DraftLength, chance: float, count: int, seed: int = 0) -> tuple[int, int]:
    """Choose some tokens, guesses holding with this chance; how many were guessed and how many of those held."""
    draws, guessed, held = random.Random(seed), 0, 0
    for _ in range(count):
        if length.decide(1000):
            guessed += 1
            is_right = draws.random() < chance
            held += is_right
            length.take(is_right)
        else:
            length.take(None)
    return guessed, held


def test_guesses_that_hold_are_made_as_far_ahead_as_may_be() -> None:
    length = DraftLength(8)

    assert grow(length, 1.0, 60)[0] > 45
    length.take(None)
    assert length.decide(1000) == 8


def test_guesses_that_never_hold_cost_one_in_thirty_in_the_end() -> None:
    length = DraftLength(8)

    assert grow(length, 0.0, 60)[0] <= 12
    assert grow(length, 0.0, 330)[0] <= 11


@pytest.mark.parametrize("limit", [1, 4, 16])
def test_guesses_come_back_soon_once_they_hold(limit: int) -> None:
    length = DraftLength(limit)
    grow(length, 0.0, 1000)

    grow(length, 1.0, 40 + 10 * limit)
    while length.left:
        length.take(True)
    length.take(None)

    assert length.decide(1000) == limit


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.9])
def test_few_guesses_are_made_that_do_not_hold(chance: float) -> None:
    guessed, held = grow(DraftLength(8), chance, 4000)

    assert (guessed - held) / 4000 < 0.5
    assert guessed / 4000 > (0.3 if chance > 0.5 else 0.02)


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(1, 3)), max_size=200))
def test_a_run_is_decided_once_and_kept_however_often_it_is_asked_for(limit: int, trace: list[tuple[int, bool, int]]) -> None:
    length, other = DraftLength(limit), DraftLength(limit)
    due, is_bonus = 0, False
    for room, is_right, asked in trace:
        answers = {length.decide(room) for _ in range(asked)}
        assert answers == {other.decide(room)} and 0 <= length.left <= limit
        if due or is_bonus:
            assert answers == {due}
        else:
            assert length.left <= room
            due = length.left
        held = is_right if due else None
        for each in (length, other):
            each.take(held)
        due, is_bonus = (due - 1, due == 1) if held else (0, False)
    assert length == other
