"""The form that a request asks its answer to have: OpenAI's `response_format`, or vLLM's `structured_outputs`, whose grammars are Lark's here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator

from quantkit.errors import BusyError, RequestError, did_you_mean
from quantkit.runtime.structure import Structure
from quantkit.server.errors import ApiError

_VLLMS_OWN = ("structural_tag", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "disable_fallback")


class JsonSchema(BaseModel):
    """Every schema is enforced, strict or not."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    body: Any = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            has = "is missing" if self.json_schema is None else f"does not go with the type {self.type!r}"
            raise ApiError(400, f"response_format.json_schema {has}; the type 'json_schema' takes it", param="response_format.json_schema")
        return self


class StructuredOutputs(BaseModel):
    """One of these; null and false stand for those that are not asked for."""

    model_config = ConfigDict(extra="allow")

    schema_or_text: Any = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None

    @model_validator(mode="after")
    def _knows_its_fields(self) -> StructuredOutputs:
        names = self.kinds()
        for name in (name for name, value in (self.model_extra or {}).items() if value not in (None, False)):
            why = "is not supported" if name in _VLLMS_OWN else f"is not known; {did_you_mean(name[:100], names)}"
            raise ApiError(400, f"structured_outputs.{name[:100]} {why}", param=f"structured_outputs.{name[:100]}")
        given = [name for name, value in names.items() if value is not None and value is not False]
        if len(given) != 1:
            held = " and ".join(given) or "nothing"
            raise ApiError(400, f"structured_outputs holds {held}; give one of {', '.join(names)}", param="structured_outputs")
        return self

    def kinds(self) -> dict[str, Any]:
        return {"json": self.schema_or_text} | {name: getattr(self, name) for name in ("regex", "choice", "grammar", "json_object")}


@dataclass(frozen=True, slots=True)
class Form:
    """A structure, and the field that asked for it."""

    field: str
    structure: Structure


def form_of(response: ResponseFormat | None, structured: StructuredOutputs | None) -> Form | None:
    """None where any text will do.

    Raises:
        ApiError: both ask for a form, or it is too large or not what its kind calls for.
    """
    if response is not None and response.type != "text":
        if structured is not None:
            raise ApiError(400, "response_format and structured_outputs both ask for a form; leave one out", param="structured_outputs")
        with naming("response_format"):
            return Form("response_format", _of_response(response))
    if structured is None:
        return None
    name, value = next((name, value) for name, value in structured.kinds().items() if value not in (None, False))
    field = f"structured_outputs.{name}"
    with naming(field):
        return Form(field, _of_structured(name, value))


@contextmanager
def naming(field: str) -> Iterator[None]:
    """What is refused within the body is refused for this field's sake."""
    try:
        yield
    except BusyError:
        raise
    except (RequestError, RecursionError) as error:
        raise ApiError(400, f"{field}: {error}", param=field) from error


def _of_response(response: ResponseFormat) -> Structure:
    if response.json_schema is None:
        return Structure("json_object")
    return Structure("json_schema", json.dumps(response.json_schema.body))


def _of_structured(name: str, value: Any) -> Structure:
    match name:
        case "json":
            return Structure("json_schema", value if isinstance(value, str) else json.dumps(value))
        case "choice":
            return Structure.choice(value)
        case "json_object":
            return Structure("json_object")
    return Structure("regex" if name == "regex" else "grammar", value)
