"""Everything that can be refused is refused here, before any work: resolve the source, read its headers, decide what becomes of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.checkpoint.output import check
from quantkit.checkpoint.source import Source, resolve
from quantkit.checkpoint.weight_files import some
from quantkit.conversion.options import DTYPES, ConvertOptions
from quantkit.conversion.plan import Plan, make_plan
from quantkit.conversion.recipe import Recipe
from quantkit.errors import OutputError, SourceError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.device import find_device


@dataclass(eq=False, slots=True)
class Prepared:
    """A conversion that has been planned and not refused."""

    origin: Source
    source: OpenedCheckpoint
    architecture: Architecture
    recipe: Recipe
    plan: Plan
    options: ConvertOptions
    device: torch.device


def check_output(source: str, out: Path, options: ConvertOptions) -> None:
    """Refuse an output that cannot be written before anything is fetched or read; creates nothing."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        require_apart(folder, out)
    check(out, overwrite=options.overwrite)


def plan_conversion(source: str, options: ConvertOptions) -> Prepared:
    """Read headers and decide everything; raises the error of whatever cannot be done."""
    recipe = Recipe.load(options.recipe).changed(overrides=options.overrides, ignore=options.ignore, group_size=options.group_size)
    device = find_device(options.device)
    origin = resolve(source, trust_remote_code=options.trust_remote_code)
    opened = _open(origin, options)
    config = load_config(origin.folder, trust_remote_code=options.trust_remote_code)
    architecture = describe(config, opened, trust_remote_code=options.trust_remote_code)
    _require_tensors(architecture, opened, origin)
    plan = make_plan(opened, architecture, recipe, options.format, max_shard_size=options.max_shard_size, dtype=DTYPES[options.dtype])
    if options.calibration.source is not None and not plan.needs_calibration:
        plan.notes.append(f"recipe {recipe.name} needs no calibration, so {options.calibration.source} is not read")
    return Prepared(origin, opened, architecture, recipe, plan, options, device)


def _open(origin: Source, options: ConvertOptions) -> OpenedCheckpoint:
    opened = OpenedCheckpoint.of(origin)
    if opened.format is not None and not options.requantize:
        schemes = sorted({scheme.name for scheme in opened.schemes.values()})
        raise SourceError(
            f"{origin.name} is already quantized: {opened.format.name}, {len(opened.schemes)} layers of {', '.join(schemes)}. "
            "Convert the original model, or pass --requantize to take the decoded weights as they are"
        )
    return opened


def require_apart(source: Path, out: Path) -> None:
    """What is read is never replaced."""
    folder, target = source.resolve(), out.expanduser().resolve()
    if target == folder or target in folder.parents:
        raise OutputError(f"{out} {'is' if target == folder else 'holds'} the source model; choose another output")


def _require_tensors(architecture: Architecture, opened: OpenedCheckpoint, origin: Source) -> None:
    """Every parameter of the model is in the checkpoint, in the shape its config says; a tied head need not be."""
    absent = []
    for path, parameter in architecture.model.named_parameters():
        name = architecture.stored.find(path)
        if name is None:
            absent += [] if architecture.stored.sources(architecture.stored.owner(path)) else [path]
        elif name in opened.reader and (stored := opened.reader.info(name).shape) != tuple(parameter.shape):
            wanted = list(parameter.shape)
            raise SourceError(f"{origin.name}: {name} is {list(stored)} where config.json asks for {wanted}; the two belong to different models")
    if absent:
        raise SourceError(f"{origin.name} lacks {len(absent)} tensors its config promises: {some(absent, 3)}; fetch the model again")
