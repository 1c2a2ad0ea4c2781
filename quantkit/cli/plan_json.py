"""A dry run's plan for programs. What only a measurement can tell is null, never a guess."""

from __future__ import annotations

from typing import Any

from quantkit.conversion.candidates import known_before
from quantkit.conversion.prepare import Prepared
from quantkit.conversion.targets import stored_by
from quantkit.formats.engine_rules import Stored
from quantkit.formats.engines import verdicts


def plan_in_json(prepared: Prepared) -> dict[str, Any]:
    """What is planned, and which engines would load it; before schemes are measured and chosen, what there is to choose from."""
    told = {"source": prepared.origin.given, "recipe": prepared.recipe.name if prepared.recipe else None}
    if prepared.needs_measurement:
        return told | _unmeasured(prepared)
    return told | {"engines": [each.to_dict() for each in verdicts(planned_checkpoint(prepared))]} | prepared.plan.to_dict()


def planned_checkpoint(prepared: Prepared) -> Stored:
    return stored_by(prepared.plan, prepared.model_dtype)


def _unmeasured(prepared: Prepared) -> dict[str, Any]:
    assert prepared.allocation is not None
    problem, told = prepared.allocation.problem, prepared.plan.to_dict()
    for unit in problem.units:
        for name in unit.layers:
            candidates = [option.layers[name].scheme.name for option in unit.options.values()]
            told["layers"][name] |= {"scheme": None, "candidates": candidates, "note": None}
    unknown = dict.fromkeys(("engines", "bytes_after", "linear_bpw", "file_bpw"))
    return told | unknown | {"needs_calibration": True, "allocation": known_before(problem, prepared.plan, prepared.model_dtype)}
