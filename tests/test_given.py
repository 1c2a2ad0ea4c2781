"""Options hold what they declare, or are refused with the name, the value and what would work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from quantkit.errors import UsageError
from quantkit.given import require_types


@dataclass(frozen=True)
class Options:
    count: int = 1
    length: int | None = None
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    wanted: bool = True

    def __post_init__(self) -> None:
        require_types(self)


@pytest.mark.parametrize("values", [{}, {"length": 3}, {"names": ["a", "b"]}, {"kind": "c"}], ids=str)
def test_values_of_the_declared_types_are_taken(values: dict[str, Any]) -> None:
    Options(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "8"}, "count is '8', a str; give a whole number"),
        ({"count": True}, "count is True, a bool; give a whole number"),
        ({"length": 2.5}, "length is 2.5, a float; give a whole number or None"),
        ({"names": None}, "names is None, a NoneType; give a list of strings"),
        ({"names": [1]}, r"names is \[1\], a list; give a list of strings"),
        ({"kind": 3}, "kind is 3, a int; give a string"),
        ({"wanted": "no"}, "wanted is 'no', a str; give True or False"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**values)
