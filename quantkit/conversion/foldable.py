"""Whether any scale of a plan's transforms has a place to go: tried before calibration on a few tokens, with real weights, a block of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.allocator import give_back
from quantkit.conversion.plan import Plan
from quantkit.conversion.prepare import Prepared
from quantkit.conversion.recipe import Recipe, list_recipes
from quantkit.conversion.transforms import sites_of, transform_of
from quantkit.errors import RecipeError
from quantkit.models.architecture import Block
from quantkit.models.streaming import BlockRunner

_NUM_TOKENS = 64


def require_places(prepared: Prepared, dtype: torch.dtype, stage: Callable[[str], None]) -> None:
    """Return as soon as one block has a place; what has none in it is named in the report.

    Args:
        dtype: in which blocks are run.

    Raises:
        RecipeError: no block has any, so that the transforms would do nothing.
    """
    plan, architecture = prepared.plan, prepared.architecture
    if not plan.moved:
        return
    stage("looking for places that scales can be folded into")
    runner, weights = BlockRunner(architecture, device=prepared.device, dtype=dtype), prepared.weights
    positions = torch.arange(min(_NUM_TOKENS, architecture.context))[None]
    ids = positions % int(architecture.config.get_text_config().vocab_size)
    runner.load_outside(weights)
    hidden = runner.embed(ids, positions)
    runner.settle(hidden, ids, positions)
    runner.unload_outside()
    why_not: dict[str, str] = {}
    for index in _one_of_each_kind(architecture.blocks, plan):
        block = architecture.blocks[index]

        def run(index: int = index) -> Tensor:
            return runner.block(index, hidden, ids, positions)

        runner.load(block.path, weights)
        wanted, found = sites_of(block, architecture, plan, run)
        runner.unload(block.path)
        give_back()
        if found.sites:
            return
        why_not |= {wanted[path]: why for path, why in found.why_not.items()}
    assert prepared.recipe is not None
    raise RecipeError(_refusal(prepared.origin.name, prepared.recipe, plan, why_not))


def _one_of_each_kind(blocks: list[Block], plan: Plan) -> Iterator[int]:
    """The first of the blocks that are built alike and have transforms on the same layers."""
    seen = set()
    for index, block in enumerate(blocks):
        asked = tuple(linear.path.removeprefix(block.path) for linear in block.linears if transform_of(plan, linear.name) is not None)
        if asked and (block.kind, asked) not in seen:
            seen.add((block.kind, asked))
            yield index


def _refusal(model: str, recipe: Recipe, plan: Plan, why_not: dict[str, str]) -> str:
    transforms = sorted({type(layer.transform).__name__ for layer in plan.layers.values() if layer.transform is not None})
    reasons: dict[str, list[str]] = {}
    for name, why in why_not.items():
        reasons.setdefault(why, []).append(name)
    told = "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}" for why, names in list(reasons.items())[:3])
    way = f"leave transforms out of recipe {recipe.name}" + "".join(f", or take {name}" for name in _plain_recipes(recipe)[:1])
    return f"{model} has no place for the scales of {' and '.join(transforms)}, whatever the calibration: {told}; {way}"


def _plain_recipes(recipe: Recipe) -> list[str]:
    """Shipped recipes of the same schemes that transform nothing, plain GPTQ first."""
    schemes = {rule.scheme for rule in recipe.rules}
    plain = [other for other in list_recipes() if other.rotation is None and not any(rule.transforms for rule in other.rules)]
    alike = [other.name for other in plain if {rule.scheme for rule in other.rules} == schemes]
    return sorted(alike, key=lambda name: not name.endswith("gptq"))
