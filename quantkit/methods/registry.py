"""Roundings by the name a recipe gives them, with the settings a recipe may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.methods.base import Rounding
from quantkit.methods.gptq import GPTQ
from quantkit.methods.rtn import RoundToNearest, SearchedScales
from quantkit.methods.tuned import Tuned

ROUNDINGS: dict[str, Callable[..., Rounding]] = {"rtn": RoundToNearest, "mse": SearchedScales, "gptq": GPTQ, "tuned": Tuned}


def get_rounding(name: str, settings: Mapping[str, Any] | None = None) -> Rounding:
    """The rounding of this name. Raises RecipeError, with near names, for an unknown rounding or setting."""
    if name not in ROUNDINGS:
        raise RecipeError(f"unknown rounding {name!r}; {did_you_mean(name, ROUNDINGS)}")
    known = [f.name for f in fields(ROUNDINGS[name])]
    for setting in settings or {}:
        if setting not in known:
            hint = did_you_mean(setting, known) if known else "it has no settings"
            raise RecipeError(f"rounding {name!r} has no setting {setting!r}; {hint}")
    return ROUNDINGS[name](**(settings or {}))
