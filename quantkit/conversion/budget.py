"""What an allocation of bits may choose from and must keep to: bits a weight, over the quantized linears or over the file, or a KL divergence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from quantkit.core.scheme import CHANNEL, WEIGHT_BITS, Scheme
from quantkit.core.scheme_names import named, parse_scheme, takes_group, with_group
from quantkit.errors import RecipeError, UsageError

_FINE_GROUP = 32
_FINE_BITS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most there may be of something.

    Attributes:
        kind: "linear" and "file" are bits a weight, of the quantized linears alone or of all weight files; "kl" is nats a token.
    """

    kind: Literal["linear", "file", "kl"]
    amount: float

    def __str__(self) -> str:
        return f"max-kl {self.amount:g}" if self.kind == "kl" else f"target-bpw {'file:' if self.kind == 'file' else ''}{self.amount:g}"


def read_budget(target_bpw: float | int | str | None, max_kl: float | int | None) -> Budget | None:
    """The budget of two options of which at most one is given.

    Args:
        target_bpw: bits per weight of the quantized linears, or "file:" and bits per weight over the whole file.

    Raises:
        UsageError: both are given, or a value means nothing.
    """
    if target_bpw is not None and max_kl is not None:
        raise UsageError(f"target-bpw {target_bpw} and max-kl {max_kl} are two budgets; give one of them")
    if max_kl is not None:
        if not (math.isfinite(max_kl) and max_kl > 0):
            raise UsageError(f"max-kl is {max_kl}; give nats a token above 0, such as 0.02")
        return Budget("kl", float(max_kl))
    if target_bpw is None:
        return None
    match = re.fullmatch(r"(file:)?(\d+(?:\.\d*)?|\.\d+)", str(target_bpw).strip())
    if match is None or float(match[2]) == 0:
        raise UsageError(f"target-bpw is {target_bpw!r}; give bits per weight such as 4.25, or file:4.5 to count the whole file")
    return Budget("file" if match[1] else "linear", float(match[2]))


class Allocate(BaseModel):
    """A recipe's wish that schemes be chosen by measurement. Without candidates each rule's are those of its scheme's family."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: tuple[str, ...] | None = None
    target_bpw: float | str | None = None
    max_kl: float | None = None

    @field_validator("candidates")
    @classmethod
    def _can_be_chosen(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return checked_candidates(value)

    @model_validator(mode="after")
    def _one_budget(self) -> Allocate:
        try:
            read_budget(self.target_bpw, self.max_kl)
        except UsageError as error:
            raise RecipeError(str(error)) from error
        return self

    @property
    def budget(self) -> Budget:
        """Raises RecipeError where there is none yet."""
        budget = read_budget(self.target_bpw, self.max_kl)
        if budget is None:
            raise RecipeError("the recipe allocates bits and names no budget; give --target-bpw or --max-kl")
        return budget


def checked_candidates(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names, if each is a weight-only scheme.

    Raises:
        RecipeError: one is unknown, leaves the layer as it is, or quantizes activations.
    """
    for name in names or ():
        scheme = parse_scheme(name)
        if scheme.weight is None or scheme.activation is not None:
            what = "leaves a layer as it is" if scheme.weight is None else "quantizes activations"
            raise RecipeError(f"candidate {name!r} {what}; candidates are weight-only schemes such as w3a16, w4a16 or w8a16")
    return names


def family(scheme: Scheme, *, with_fine: bool) -> tuple[str, ...]:
    """The candidates that go with a rule's scheme: every width in its groups.

    Args:
        with_fine: the narrow widths in groups of 32 too. Between 4 and 8 bits they are worth having; beside 5 and 6 bits they gain next to nothing.

    Raises:
        RecipeError: the scheme is of no such family.
    """
    weight = scheme.weight
    if weight is None or scheme.activation is not None or not takes_group(scheme):
        raise RecipeError(f"bits cannot be allocated in the family of {scheme.name}; name candidates in the recipe's allocate")
    widths = [named(replace(weight, bits=bits), None) for bits in WEIGHT_BITS]
    is_coarse = weight.group == CHANNEL or weight.group > _FINE_GROUP
    fine = [with_group(each, _FINE_GROUP) for each in widths if with_fine and is_coarse and each.weight.bits in _FINE_BITS]
    return tuple(each.name for each in widths + fine)
