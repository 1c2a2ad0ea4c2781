"""What users give as options: values of the declared types, and sizes with a unit. Whether they can be done is found out elsewhere."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quantkit.errors import UsageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WORDS = {int: "a whole number", str: "a string", bool: "True or False", tuple: "a list of strings", NoneType: "None"}


def require_types(options: Any) -> None:
    """Raises UsageError for a field of a dataclass that does not hold what it declares; whole numbers, strings, lists of strings and the like."""
    for name, hint in get_type_hints(type(options)).items():
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
        value = getattr(options, name)
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_WORDS.get(kind, "a string" if kind is Literal else f"a {kind.__name__}") for kind in kinds)
            raise UsageError(f"{name} is {value!r}, a {type(value).__name__}; give {wanted}")


def is_number(value: object) -> bool:
    """True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def size_in_bytes(text: str) -> int:
    """The bytes of "5GB", "1.5 MB", "512MiB" or "100000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no size; write 5GB, 500MB or 512MiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _is(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return isinstance(value, str if kind is Literal else kind)
