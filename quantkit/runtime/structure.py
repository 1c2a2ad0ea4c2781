"""The form that a request's text must have. What it means is known to `matcher`; here it is only said, and kept within bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quantkit.errors import RequestError, did_you_mean

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]
MAX_LENGTH = 64 << 10
MAX_CHOICES = 1000


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
        if self.kind == "json_schema" and not isinstance(self._json(), dict | bool):
            raise RequestError(f"the structure's json_schema is {self.text[:40]!r}; give a JSON object")
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
