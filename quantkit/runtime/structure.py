"""The form that a request's text must have. What it means is known to `matcher`; here it is only said, and kept within bounds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from quantkit.errors import RequestError, did_you_mean

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]
MAX_LENGTH = 64 << 10
MAX_CHOICES = 1000
MAX_MULTIPLE = 20_000
"""Of multipleOf. Its remainders are states, which llguidance keeps without a limit of its own: a million take seconds and 200 MB."""
_EMBEDDED = re.compile(r"%json\b\s*")


@dataclass(frozen=True, slots=True)
class Structure:
    """What the text must be.

    Attributes:
        kind: json_schema (a value of that schema), json_object (any object), regex (all of the text), grammar (Lark's syntax, from `start`), choice.
        text: the schema as JSON, the regex, the grammar, or the choices as a JSON array of strings; nothing for json_object.

    Raises:
        RequestError: the kind is not known, or the text is too long or not what its kind calls for.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(f"unknown structure {self.kind!r}; {did_you_mean(str(self.kind), get_args(Kind))}")
        if not isinstance(self.text, str) or (not self.text.strip() and self.kind != "json_object"):
            raise RequestError(f"the structure's {self.kind} is empty; give its text")
        if len(self.text) > MAX_LENGTH:
            raise RequestError(f"the structure's {self.kind} has {len(self.text):,} characters; give at most {MAX_LENGTH:,}")
        if self.kind == "json_schema" and not isinstance(self._json(), dict):
            raise RequestError(f"the structure's json_schema is {self.text[:40]!r}; give a JSON object")
        if _counts_too_far(_multiples(list(self._schemas()))):
            message = f"multipleOf, or what several have in common, is above {MAX_MULTIPLE:,} units of its last decimal place; give a smaller one"
            raise RequestError(f"the structure's {self.kind}: {message}")
        if self.kind == "choice":
            choices = self._json()
            if not isinstance(choices, list) or not choices or any(not isinstance(choice, str) or not choice for choice in choices):
                raise RequestError(f"the structure's choice is {self.text[:40]!r}; give a JSON array of strings that are not empty")
            if len(choices) > MAX_CHOICES:
                raise RequestError(f"the structure's choice has {len(choices):,} strings; give at most {MAX_CHOICES:,}")

    @classmethod
    def schema(cls, schema: dict[str, Any]) -> Structure:
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Structure:
        return cls("choice", json.dumps(list(choices)))

    def _json(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the structure's {self.kind} is not JSON: {error}") from error

    def _schemas(self) -> Iterator[Any]:
        """Those that it is or holds."""
        if self.kind == "json_schema":
            yield self._json()
        if self.kind == "grammar":
            for place in _EMBEDDED.finditer(self.text):
                try:
                    yield json.JSONDecoder().raw_decode(self.text, place.end())[0]
                except (ValueError, RecursionError) as error:
                    raise RequestError(f"the structure's grammar has a %json without JSON behind it: {error}") from error


def _multiples(schemas: list[Any]) -> list[Decimal]:
    """Every multipleOf within them."""
    found: list[Decimal] = []
    while schemas:
        each = schemas.pop()
        if isinstance(each, dict):
            value = each.get("multipleOf")
            if isinstance(value, int | float) and (number := Decimal(str(value + 0))).is_finite() and number:
                found.append(abs(number).normalize())
            schemas += each.values()
        elif isinstance(each, list):
            schemas += each
    return found


def _counts_too_far(multiples: list[Decimal]) -> bool:
    """Whether their least common multiple, in units of the last decimal place that any of them has, is above the limit."""
    common, digits = 1, max((0, *(-int(value.as_tuple().exponent) for value in multiples)))
    for value in multiples:
        common = math.lcm(common, int(value.scaleb(digits)))
        if common > MAX_MULTIPLE:
            return True
    return False
