"""What training never sees: items are held out by a checksum of their own text, so no list has to be kept or trusted."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import TypeVar

Item = TypeVar("Item")
ONE_IN = 16


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % ONE_IN == 0


def draw(make: Callable[[random.Random], Item], text_of: Callable[[Item], str], rng: random.Random, *, held_out: bool) -> Item:
    """The next item of `make` that is, or is not, held out."""
    while is_held_out(text_of(item := make(rng))) != held_out:
        pass
    return item
