"""Blocks of the KV cache: who holds them, which prefixes lie in them, which is taken next. Numbers only: no tensors, no device.

A block is used (somebody holds it), cached (nobody holds it, but the prefix in it can be found again) or free. Full blocks are found by a hash that
covers everything before them, and a hit counts only if the tokens are equal, so no two prefixes are ever confused.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

from quantkit.errors import EngineError


@dataclass(slots=True)
class _Block:
    references: int = 0
    key: bytes | None = None
    tokens: tuple[int, ...] = ()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens with reference counts; those nobody holds are reused in the order in which they were let go.

    Args:
        caching: keep full blocks findable after they are let go.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.block_size, self.caching = block_size, caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._found: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_idle(self) -> int:
        """Blocks that can be taken: free and cached ones."""
        return len(self._idle)

    @property
    def num_cached(self) -> int:
        return sum(self._blocks[block].key is not None for block in self._idle)

    @property
    def num_used(self) -> int:
        return len(self._blocks) - len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int | None:
        """A block for one holder, or None when all are held. What was cached in it is forgotten."""
        if not self._idle:
            return None
        number, _ = self._idle.popitem(last=False)
        block = self._blocks[number]
        if block.key is not None:
            del self._found[block.key]
            block.key, block.tokens = None, ()
        block.references = 1
        return number

    def hold(self, block: int) -> None:
        """One more holder of a block that is used or cached."""
        if self._blocks[block].references == 0:
            del self._idle[block]
        self._blocks[block].references += 1

    def free(self, blocks: Tokens[int]) -> None:
        """One holder fewer of each. The last ones are reused first, so that a prefix loses its end before its beginning."""
        for number in reversed(blocks):
            block = self._blocks[number]
            assert block.references > 0, f"block {number} is let go more often than it was held"
            block.references -= 1
            if block.references == 0:
                self._idle[number] = None
                if block.key is None:
                    self._idle.move_to_end(number, last=False)

    def is_shared(self, block: int) -> bool:
        return self._blocks[block].references > 1

    def find(self, key: bytes, tokens: Tokens[int]) -> int | None:
        """The block that holds these tokens behind the prefix that the key covers."""
        number = self._found.get(key)
        return number if number is not None and self._blocks[number].tokens == tuple(tokens) else None

    def remember(self, number: int, key: bytes, tokens: Tokens[int]) -> None:
        """Let a full block be found. Where another block holds the same prefix already, that one stays the one that is found."""
        block = self._blocks[number]
        assert len(tokens) == self.block_size and block.references > 0
        if self.caching and block.key is None and key not in self._found:
            block.key, block.tokens = key, tuple(tokens)
            self._found[key] = number

    def check(self) -> None:
        """Every invariant, for tests and for an idle engine.

        Raises:
            EngineError: one does not hold.
        """
        idle = {number for number, block in enumerate(self._blocks) if block.references == 0}
        found = {number for number, block in enumerate(self._blocks) if block.key is not None}
        if idle != set(self._idle) or any(block.references < 0 for block in self._blocks):
            raise EngineError("the KV cache's blocks do not add up: free, cached and used blocks are not all of them")
        if found != set(self._found.values()) or any(self._blocks[n].key != key for key, n in self._found.items()):
            raise EngineError("the KV cache's prefixes do not match its blocks")


def root_key(salt: str = "") -> bytes:
    """The key before the first block. Prompts under different salts (tenants, adapters) share nothing."""
    return blake2b(salt.encode(), digest_size=16).digest()


def next_key(key: bytes, tokens: Tokens[int]) -> bytes:
    """The key of a block of tokens behind the prefix of `key`."""
    return blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()
