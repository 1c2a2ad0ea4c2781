"""The rotation that a recipe asks for: `hadamard`, or a mapping of that name and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from quantkit.errors import RecipeError, did_you_mean

ROTATIONS = ("hadamard",)
NO_ROTATION = "none"


class Rotation(BaseModel):
    """An orthogonal matrix for the hidden states of the whole model, and one for every head between values and the attention's output.

    Attributes:
        seed: of the matrices' signs.
        heads: rotate the heads too (R2 of SpinQuant); the hidden states (R1) always are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = "hadamard"
    seed: int = Field(default=0, ge=0)
    heads: bool = True

    @field_validator("name")
    @classmethod
    def _exists(cls, value: str) -> str:
        if value not in ROTATIONS:
            raise RecipeError(f"unknown rotation {value!r}; {did_you_mean(value, [*ROTATIONS, NO_ROTATION])}")
        return value


def rotation_named(asked: Any) -> Any:
    """What a recipe or the command line has under `rotation`, with a bare name as a mapping; None for none.

    Raises:
        RecipeError: there is no rotation of this name.
    """
    if asked is None or asked == NO_ROTATION:
        return None
    if isinstance(asked, str):
        return Rotation(name=asked)
    if isinstance(asked, Mapping) and "name" not in asked:
        raise RecipeError(f"rotation {dict(asked)} has no name; write it as {{name: hadamard, seed: 1}}")
    return asked
