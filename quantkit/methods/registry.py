"""Roundings and transforms by the name a recipe gives them, with the settings a recipe may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.methods.awq import AWQ
from quantkit.methods.base import Rounding, Transform
from quantkit.methods.gptq import GPTQ
from quantkit.methods.hqq import HalfQuadratic
from quantkit.methods.rtn import RoundToNearest, SearchedScales
from quantkit.methods.smoothquant import SmoothQuant
from quantkit.methods.tuned import Tuned

ROUNDINGS: dict[str, Callable[..., Rounding]] = {"rtn": RoundToNearest, "mse": SearchedScales, "hqq": HalfQuadratic, "gptq": GPTQ, "tuned": Tuned}
TRANSFORMS: dict[str, Callable[..., Transform]] = {"awq": AWQ, "smoothquant": SmoothQuant}


def get_rounding(name: str, settings: Mapping[str, Any] | None = None) -> Rounding:
    """The rounding of this name. Raises RecipeError, with near names, for an unknown rounding or setting."""
    return _get("rounding", ROUNDINGS, name, settings or {})


def get_transform(name: str, settings: Mapping[str, Any] | None = None) -> Transform:
    """The transform of this name. Raises RecipeError, with near names, for an unknown transform or setting."""
    return _get("transform", TRANSFORMS, name, settings or {})


def _get(kind: str, table: Mapping[str, Callable[..., Any]], name: str, settings: Mapping[str, Any]) -> Any:
    if name not in table:
        raise RecipeError(f"unknown {kind} {name!r}; {did_you_mean(name, table)}")
    known = [f.name for f in fields(table[name])]
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(setting, known) if known else "it has no settings"
            raise RecipeError(f"{kind} {name!r} has no setting {setting!r}; {hint}")
    return table[name](**settings)
