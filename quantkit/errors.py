"""Every error a user can cause, as one tree; the command line prints them as one message without a traceback.

QuantkitError
├── UsageError          an option or argument that cannot be meant (exit code 2)
├── SourceError         a model that is not there, not whole, or not of a kind quantkit converts
├── CheckpointError     a checkpoint file that is damaged, truncated, unsafe or half written
├── FormatError         a container that cannot hold, or does not contain, what was asked
├── RecipeError         a recipe that is not valid, or does not fit the model
├── CalibrationError    calibration data that is empty, too short or unreadable
├── RequestError        a request to the runtime that cannot be served: parameters, length, tokens
│   ├── TooLongError    more tokens than the context or the cache holds
│   └── BusyError       the queue is full or closed; later it may be served
├── EngineError         the runtime itself failed; every waiting caller gets it
├── OutputError         a place that cannot be written or listened on: it exists, is taken, is read-only, or has no space
└── Interrupted         a clean stop asked for by the user; the work so far is kept
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantkitError(Exception):
    """A mistake the user can mend. The message names the thing, the value and what would work."""

    exit_code = 1


class UsageError(QuantkitError):
    exit_code = 2


class SourceError(QuantkitError):
    pass


class CheckpointError(QuantkitError):
    pass


class FormatError(QuantkitError):
    pass


class RecipeError(QuantkitError):
    pass


class CalibrationError(QuantkitError):
    pass


class RequestError(QuantkitError):
    exit_code = 2


class TooLongError(RequestError):
    pass


class BusyError(RequestError):
    pass


class EngineError(QuantkitError):
    pass


class OutputError(QuantkitError):
    pass


class Interrupted(QuantkitError):
    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: near names if there are any, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + ", ".join(names)
