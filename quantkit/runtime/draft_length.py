"""How many tokens are guessed ahead of one sequence: more while its guesses hold, none but a rare trial while they do not.

What is decided here depends on the sequence's own text and guesses, never on the batch: a run of guesses, once begun, is held to over as many steps
as it takes. A token at a guessed place is drawn otherwise than one without a guess (see `sampler.verify`), so this is what makes a seed's tokens the
same in any company.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_WORTH = 0.4
"""A run goes on as long as all of it holds with this chance."""
_START, _MOST = 0.8, 0.99
_WEIGHT = 1 / 8
_LONGEST_PAUSE = 32


@dataclass(slots=True)
class DraftLength:
    """The guesses of one sequence.

    Attributes:
        limit: guesses of a run at most.
        left: places from the next token on that are to be guessed in the run under way.
        chance: that a guess holds, by the latest ones.
        rest: tokens to come without a guess before the next trial, and pause how many the next rest will be.
        is_decided: whether `left` is meant for the next token; else a run begins when it is asked for.
    """

    limit: int = 4
    left: int = 0
    chance: float = _START
    rest: int = 0
    pause: int = 1
    is_decided: bool = False

    def decide(self, room: int) -> int:
        """How many places from the next token on are guessed, where `room` guesses may follow; the same answer until a token is chosen."""
        if not self.is_decided:
            self.left = 0 if self.rest else max(0, min(self._worth, room))
            self.is_decided = True
        return self.left

    def take(self, held: bool | None) -> None:
        """The next token was chosen: its guess held or fell, or there was none."""
        self.is_decided = False
        if held is None:
            self.rest = max(0, self.rest - 1)
        elif held:
            self.chance = min(_MOST, self.chance + _WEIGHT * (1 - self.chance))
            self.pause = 1
            self.left -= 1
            self.is_decided = True  # the run goes on, or its last guess is followed by a token without one
        else:
            self.chance -= _WEIGHT * self.chance
            if self.chance < _WORTH:
                self.rest, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)

    @property
    def _worth(self) -> int:
        return min(self.limit, max(1, int(math.log(_WORTH) / math.log(self.chance))))
