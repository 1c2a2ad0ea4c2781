"""The form that the answer is to have, on the command line; what is wrong with it is said before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.runtime.structure import Structure

_OPTIONS = (
    click.option("--json-schema", metavar="FILE-OR-TEXT", help="Answer with JSON of this schema."),
    click.option("--json-object", is_flag=True, help="Answer with any JSON object."),
    click.option("--regex", help="Answer with a text that matches this as a whole."),
    click.option("--grammar", metavar="FILE", help="Answer with a text of this grammar, in Lark's syntax, from its rule `start`."),
    click.option("--choice", multiple=True, metavar="TEXT", help="Answer with one of these; repeat it."),
)
_NAMES = ("json_schema", "json_object", "regex", "grammar", "choice")


def structure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_structure(options: dict[str, Any]) -> Structure | None:
    """Take these options out; None where none is given.

    Raises:
        UsageError: several are given, or a file cannot be read; RequestError: it is not what its kind calls for, or compiles for no model.
    """
    given = {name: value for name in _NAMES if (value := options.pop(name)) not in (None, False, ())}
    if not given:
        return None
    if len(given) > 1:
        raise UsageError(f"{' and '.join(map(_option, given))} are given, and an answer has one form; leave all but one out")
    from quantkit.runtime.matcher import require_compilable

    ((name, value),) = given.items()
    structure = _structure(name, value)
    require_compilable(structure)
    return structure


def _structure(name: str, value: Any) -> Structure:
    from quantkit.runtime.structure import Structure

    match name:
        case "json_schema":
            return Structure("json_schema", value if value.lstrip().startswith("{") else _read(name, value, "a file, or a schema that starts with {"))
        case "grammar":
            return Structure("grammar", _read(name, value, "a file"))
        case "choice":
            return Structure.choice(value)
        case "json_object":
            return Structure("json_object")
    return Structure("regex", value)


def _read(name: str, path: str, wanted: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{_option(name)} {path!r}: {error.strerror}; give {wanted}") from error
    except ValueError as error:
        raise UsageError(f"{_option(name)} {path!r} is no text in UTF-8: {error}") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
