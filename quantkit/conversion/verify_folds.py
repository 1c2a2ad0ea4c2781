"""What a checkpoint's own recipe says was folded into it: the rotated original can be made again, and scales of transforms cannot."""

from __future__ import annotations

from collections.abc import Collection

import torch

from quantkit.conversion.recipe import Recipe
from quantkit.conversion.rotating import RotatedWeights, plan_rotation
from quantkit.errors import QuantkitError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.streamed import FileOrder
from quantkit.models.architecture import Architecture, describe, load_config

_SUMS = 1e-5
"""Relative difference that float32 sums of another order make."""


def own_recipe(opened: OpenedCheckpoint, source: OpenedCheckpoint | None) -> Recipe | None:
    """The recipe beside a checkpoint, where it is one of ours and is not the one that its original was made by."""
    path = opened.reader.folder / "recipe.yaml"
    try:
        recipe = Recipe.load(str(path))
    except QuantkitError:  # there is none, or it is of another tool
        return None
    before = None if source is None else source.reader.folder / "recipe.yaml"
    came_along = before is not None and before.is_file() and before.read_bytes() == path.read_bytes()
    return None if came_along and (source.format is not None or opened.format is None) else recipe


def folded_tensors(recipe: Recipe | None, architecture: Architecture | None) -> set[str]:
    """Tensors that scales may have been folded into: those of the blocks, where the recipe has transforms."""
    if recipe is None or architecture is None or not any(rule.transforms for rule in recipe.rules):
        return set()
    paths = (f"{block.path}.{name}" for block in architecture.blocks for name, _ in block.module.named_parameters())
    return {source for path in paths for source in architecture.stored.sources(path)}


def rotated_source(recipe: Recipe | None, source: OpenedCheckpoint | None, *, trust_remote_code: bool) -> RotatedWeights | None:
    """The original as the recipe rotates it; None where it does not.

    Raises:
        QuantkitError: the original cannot be rotated, so that the checkpoint was not made of it.
    """
    if recipe is None or recipe.rotation is None or source is None:
        return None
    folder = source.reader.folder
    original = describe(load_config(folder, trust_remote_code=trust_remote_code), source, trust_remote_code=trust_remote_code)
    rotation = plan_rotation(recipe.rotation, original, source, folder.name, trust_remote_code=trust_remote_code)
    return RotatedWeights(FileOrder(source, rotation.architecture), rotation)


def unlike_rotated(opened: OpenedCheckpoint, source: RotatedWeights, leave_out: Collection[str]) -> tuple[list[str], int]:
    """Unquantized tensors that are not the original's rotated, but for the rounding to their type, and how many are."""
    problems, num_alike = [], 0
    for name in source.rotation.folds:
        if name in leave_out or name not in opened or name.removesuffix(".weight") in opened.schemes:
            continue
        ours, theirs = opened.get(name), source.get(name)
        if ours.shape != theirs.shape:
            problems.append(f"{name} is {list(ours.shape)}, and {list(theirs.shape)} in the original")
            continue
        error = float((ours.float() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if error <= torch.finfo(ours.dtype).eps + _SUMS:
            num_alike += 1
        else:
            problems.append(f"{name} is {error:.3g} of its size away from the original's, rotated as recipe.yaml says")
    return problems, num_alike
