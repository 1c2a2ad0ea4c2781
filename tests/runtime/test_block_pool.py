"""Blocks are counted, shared, found again by exactly their prefix, and reused oldest first."""

from __future__ import annotations

import pytest

from quantkit.errors import EngineError
from quantkit.runtime.block_pool import BlockPool, next_key, root_key

KEY = next_key(root_key(), [1, 2])


def filled(pool: BlockPool, key: bytes = KEY, tokens: tuple[int, ...] = (1, 2)) -> int:
    block = pool.allocate()
    assert block is not None
    pool.remember(block, key, tokens)
    return block


def test_a_pool_hands_out_every_block_once_and_then_none() -> None:
    pool = BlockPool(3, 2)

    assert {pool.allocate() for _ in range(3)} == {0, 1, 2}
    assert pool.allocate() is None
    assert (pool.num_used, pool.num_idle, pool.num_cached) == (3, 0, 0)


def test_a_block_is_reusable_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1, 2)
    block = pool.allocate()
    pool.hold(block)
    assert pool.is_shared(block)

    pool.free([block])
    assert pool.allocate() is None and not pool.is_shared(block)
    pool.free([block])

    assert pool.allocate() == block


def test_letting_go_twice_is_a_fault() -> None:
    pool = BlockPool(1, 2)
    pool.free([pool.allocate()])

    with pytest.raises(AssertionError, match="more often than it was held"):
        pool.free([0])


def test_a_cached_block_is_found_and_held_again() -> None:
    pool = BlockPool(2, 2)
    block = filled(pool)
    pool.free([block])
    assert pool.num_cached == 1

    found = pool.find(KEY, [1, 2])
    pool.hold(found)

    assert found == block and pool.num_cached == 0 and pool.num_used == 1
    pool.check()


def test_a_hit_needs_equal_tokens_even_where_the_hash_is_equal() -> None:
    pool = BlockPool(2, 2)
    filled(pool, KEY, (1, 2))

    assert pool.find(KEY, [1, 3]) is None


def test_salts_and_prefixes_keep_equal_tokens_apart() -> None:
    keys = {next_key(root_key(salt), [1, 2]) for salt in ("", "a", "b")} | {next_key(next_key(root_key(), [0, 0]), [1, 2])}

    assert len(keys) == 4


def test_free_blocks_go_before_cached_ones_and_those_oldest_first() -> None:
    pool = BlockPool(3, 2)
    first, second, plain = filled(pool), filled(pool, b"2", (3, 4)), pool.allocate()
    for block in (first, second, plain):
        pool.free([block])

    assert [pool.allocate() for _ in range(3)] == [plain, first, second]
    assert pool.find(KEY, [1, 2]) is None and pool.find(b"2", [3, 4]) is None


def test_a_prefix_loses_its_end_first() -> None:
    pool = BlockPool(2, 2)
    blocks = [filled(pool), filled(pool, b"2", (3, 4))]
    pool.free(blocks)

    assert pool.allocate() == blocks[1]


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = BlockPool(2, 2)
    first, second = filled(pool), filled(pool)

    assert pool.find(KEY, [1, 2]) == first
    pool.free([second])
    assert pool.num_cached == 0
    pool.check()


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 2, caching=False)
    filled(pool)

    assert pool.find(KEY, [1, 2]) is None


def test_the_check_notices_a_block_that_belongs_nowhere() -> None:
    pool = BlockPool(2, 2)
    pool.allocate()
    pool._blocks[0].references = 0

    with pytest.raises(EngineError, match="do not add up"):
        pool.check()
