"""Everything that can be refused is refused here, before any work: resolve the source, read its headers, decide what becomes of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil, inf
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.output import check
from quantkit.checkpoint.source import Source, resolve
from quantkit.checkpoint.weight_files import some
from quantkit.conversion.allocation import Allocation, Problem, state_problem
from quantkit.conversion.allocation_file import Measurement, allocation_path
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.candidates import loadable, require_mixture
from quantkit.conversion.moving import note_ambiguity, plan_moves, plan_plain
from quantkit.conversion.options import DEFAULT_RECIPE, ConvertOptions
from quantkit.conversion.plan import Plan, make_plan
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.rotating import PlannedRotation, RotatedWeights, plan_rotation
from quantkit.conversion.targets import require_loadable
from quantkit.conversion.tuning import tuning_of
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import PLAIN
from quantkit.formats.stored_layers import stored_shape
from quantkit.formats.streamed import FileOrder
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.device import find_device
from quantkit.models.experts import expert_of, separate_experts


@dataclass(eq=False, slots=True)
class Prepared:
    """A conversion that has been planned and not refused."""

    origin: Source
    source: OpenedCheckpoint
    architecture: Architecture
    recipe: Recipe | None
    """None where nothing is quantized: a source that only changes its container."""
    plan: Plan
    options: ConvertOptions
    device: torch.device
    allocation: Allocation | None = None
    """While nothing is measured, `plan` is a stand-in of about the size."""
    rotation: PlannedRotation | None = None

    @property
    def needs_measurement(self) -> bool:
        return self.allocation is not None and self.allocation.measurement is None

    @property
    def model_dtype(self) -> torch.dtype:
        """The type of the output's unquantized tensors, of most where each keeps its own."""
        return self.options.carried_dtype or self.source.dtype

    @property
    def weights(self) -> FileOrder | RotatedWeights:
        """What is converted: the source's dense weights, rotated where the recipe asks for it."""
        weights = FileOrder(self.source, self.architecture)
        if self.rotation is None:
            return weights
        quantized = {f"{name}.weight" for name in self.plan.layers}
        stored = {name: self.plan.planned[name].dtype for name in self.rotation.folds if name not in quantized}
        return RotatedWeights(weights, self.rotation, stored)


def check_output(source: str, out: Path, options: ConvertOptions) -> None:
    """Refuse an output that cannot be written before anything is fetched or read; creates nothing."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        require_apart(folder, out)
    check(out, overwrite=options.overwrite)


def plan_conversion(source: str, options: ConvertOptions) -> Prepared:
    """Read headers and decide everything; raises the error of whatever cannot be done."""
    recipe = Recipe.load(options.recipe or DEFAULT_RECIPE).changed(
        overrides=options.overrides, ignore=options.ignore, group_size=options.group_size, budget=options.budget, kv_cache=options.kv_cache,
        rotation=options.rotation, moe_calibrate_all_experts=options.moe_calibrate_all_experts,
    )  # fmt: skip
    options = replace(options, format=options.format or recipe.format)
    if options.allocation is not None and recipe.allocate is None:
        raise UsageError(f"allocation {options.allocation} is given and no budget; add --target-bpw or --max-kl, or take a recipe that allocates")
    device = find_device(options.device)
    origin = resolve(source, trust_remote_code=options.trust_remote_code)
    opened = OpenedCheckpoint.of(origin)
    keeps_codes = _keeps_codes(opened, origin, options)
    config = load_config(origin.folder, trust_remote_code=options.trust_remote_code)
    architecture = describe(config, opened, trust_remote_code=options.trust_remote_code)
    _require_tensors(architecture, opened, origin)
    if options.container == PLAIN.name or keeps_codes:
        is_plain = options.container == PLAIN.name
        plan = plan_plain(opened, architecture, options) if is_plain else plan_moves(opened, architecture, options, origin.name)
        _note_unread(plan, options, "a change of container")
        return _targeted(Prepared(origin, opened, architecture, None, plan, options, device))
    if options.moe_calibrate_all_experts:
        _require_experts(architecture, origin)
    rotation = None
    if recipe.rotation is not None:
        _plan(opened, architecture, recipe, options, None)  # refuses what needs no look at how the model computes
        rotation = plan_rotation(recipe.rotation, architecture, opened, origin.name, trust_remote_code=options.trust_remote_code)
        architecture = rotation.architecture
    plan = _plan(opened, architecture, recipe, options, rotation)
    prepared = Prepared(origin, opened, architecture, recipe, plan, options, device, rotation=rotation)
    prepared = _with_problem(prepared) if recipe.allocate is not None else _targeted(prepared)
    if not (prepared.needs_measurement or prepared.plan.needs_calibration):
        _note_unread(prepared.plan, options, f"recipe {recipe.name}")
    return prepared


def _note_unread(plan: Plan, options: ConvertOptions, what: str) -> None:
    """What was said of a calibration that is not needed has no effect."""
    given, usual = options.calibration, CalibrationOptions()
    changed = [f.name for f in fields(given) if f.name != "source" and getattr(given, f.name) != getattr(usual, f.name)]
    if given.source is not None:
        plan.notes.append(f"{what} needs no calibration, so {given.source} is not read")
    elif changed:
        plan.notes.append(f"{what} needs no calibration, so {' and '.join(changed)} {'change' if len(changed) > 1 else 'changes'} nothing")


def _plan(
    opened: OpenedCheckpoint, architecture: Architecture, recipe: Recipe, options: ConvertOptions, rotation: PlannedRotation | None,
    allocated: Mapping[str, str] | None = None,
) -> Plan:  # fmt: skip
    settings = {"max_shard_size": options.max_shard_size, "dtype": options.carried_dtype}
    plan = make_plan(opened, architecture, recipe, options.container, allocated=allocated, **settings)
    tuning_of(plan)  # refuses rules that tune unlike
    if rotation is not None:
        rotation.add_to(plan)
    if opened.format is not None:
        note_ambiguity(plan, opened)
    elif options.requantize:
        plan.notes.append("the source is not quantized, so there is nothing that --requantize changes")
    return plan


def _targeted(prepared: Prepared) -> Prepared:
    """The same, unless an engine that it is meant for would not load it."""
    require_loadable(prepared.plan, prepared.source, prepared.options, prepared.model_dtype)
    return prepared


def _with_problem(prepared: Prepared) -> Prepared:
    """What there is to choose; chosen already where the user gave a measurement. Refuses what the engines it is meant for would not load."""
    assert prepared.recipe is not None and prepared.recipe.allocate is not None
    options, budget = prepared.options, prepared.recipe.allocate.budget
    problem = state_problem(prepared.plan, prepared.recipe, options.container, prepared.model_dtype)
    problem = loadable(problem, prepared.plan, options, prepared.model_dtype)
    problem.require_possible(is_users=options.budget is not None)
    if budget.kind == "kl" and not (prepared.plan.needs_calibration and options.measure):
        why = f"recipe {prepared.recipe.name} measures nothing; take a calibrated one, such as w4a16-gptq"
        raise UsageError(f"{budget} is kept to by measuring, and {why}")
    prepared = replace(prepared, allocation=Allocation(problem))
    path = allocation_path(options.allocation) if options.allocation is not None else None
    if path is not None and path.exists():
        measurement = Measurement.read(path)
        if measurement.made_by.get("rotation") != (prepared.rotation and prepared.rotation.settings):
            raise UsageError(f"{path} was measured after another rotation, or none; name a new file for a new measurement")
        prepared.allocation.require_covered(measurement, path, prepared.source.reader.fingerprint())
        chosen = allocated(prepared, measurement)
        measured, asked = measurement.made_by.get("roundings"), list(prepared.plan.roundings)
        if measured != asked:
            unlike = f"{path} was measured with {' and '.join(measured or ['roundings that it does not tell'])}"
            chosen.plan.notes.append(f"{unlike}, and here {' and '.join(asked)} is asked for: what is predicted is of the former")
        return chosen
    solution = problem.solve(problem.guess()) if budget.kind != "kl" else problem.solve_bits(problem.guess(), 1.0, inf)
    assert solution is not None
    plan = _plan(prepared.source, prepared.architecture, prepared.recipe, options, prepared.rotation, solution.layers)
    plan.notes += problem.dropped
    require_mixture(problem, plan, options, prepared.model_dtype)
    return replace(prepared, plan=plan)


def allocated(prepared: Prepared, measurement: Measurement) -> Prepared:
    """The same with the schemes that the measurement and the budget ask for.

    Raises:
        UsageError: no choice is predicted to keep to the KL.
    """
    assert prepared.allocation is not None and prepared.recipe is not None
    problem, spare = prepared.allocation.problem, 0
    factor = measurement.factor(prepared.plan.roundings)
    while True:
        solution = problem.solve(measurement.losses, factor, spare)
        if solution is None and problem.budget.kind == "kl" and measurement.trials:
            solution = problem.solve_bits(measurement.losses, factor, inf)  # what was predicted to do did not: do what can be done
        if solution is None:
            raise UsageError(_out_of_reach(problem, measurement, factor))
        plan = _plan(prepared.source, prepared.architecture, prepared.recipe, prepared.options, prepared.rotation, solution.layers)
        over = ceil((plan.file_bpw - problem.budget.amount) * plan.parameters) if problem.budget.kind == "file" else 0
        if over <= 0:
            plan.notes += problem.dropped
            require_loadable(plan, prepared.source, prepared.options, prepared.model_dtype)
            return replace(prepared, plan=plan, allocation=Allocation(problem, measurement, solution))
        spare += over  # headers of another length


def _out_of_reach(problem: Problem, measurement: Measurement, factor: float) -> str:
    best = problem.solve_bits(measurement.losses, factor, inf)
    assert best is not None
    if problem.budget.kind != "kl":
        return f"{problem.budget} is a few bytes of headers below what these candidates come to; {problem.range[0] + 0.001:.3f} works"
    largest = f"the largest, {best.linear_bpw:.3f} bits a weight, is predicted at {best.predicted:.2g}"
    return f"no choice of these candidates is predicted to keep to {problem.budget}: {largest}; ask for that or more, or name other candidates"


def _keeps_codes(opened: OpenedCheckpoint, origin: Source, options: ConvertOptions) -> bool:
    """Whether a quantized source goes over as it is.

    Raises:
        SourceError: it is quantized, and what is to become of it is not said.
    """
    if opened.format is None or options.container == PLAIN.name:
        return False
    if options.format is not None and not options.asks_to_quantize:
        return True
    if not options.requantize:
        schemes = ", ".join(sorted({scheme.name for scheme in opened.schemes.values()}))
        what = f"{origin.name} is already quantized: {opened.format.name}, {len(opened.schemes)} layers of {schemes}"
        as_it_is = "name a container alone, as in --format compressed-tensors, to move it there as it is"
        raise SourceError(f"{what}. Convert the original model; or {as_it_is}; or pass --requantize to quantize the decoded weights")
    return False


def require_apart(source: Path, out: Path) -> None:
    """What is read is never replaced."""
    folder, target = source.resolve(), out.expanduser().resolve()
    if target == folder or target in folder.parents:
        raise OutputError(f"{out} {'is' if target == folder else 'holds'} the source model; choose another output")


def _require_experts(architecture: Architecture, origin: Source) -> None:
    """There are experts, and none that the model's own code runs, on tokens of its choice."""
    shown = {id(module) for block in architecture.blocks for experts in separate_experts(block.module) for module in experts.modules()}
    linears = [linear for block in architecture.blocks for linear in block.linears if expert_of(linear.name)]
    own = [linear.name for linear in linears if id(architecture.model.get_submodule(linear.path)) not in shown]
    if not shown or own:
        why = f"{some(own)} are run by the model's own code, on the tokens routed to them" if own else "it has no experts that can be run one by one"
        raise UsageError(f"{origin.name} cannot show all experts every token: {why}; leave --moe-calibrate-all-experts out")


def _require_tensors(architecture: Architecture, opened: OpenedCheckpoint, origin: Source) -> None:
    """Every parameter of the model is in the checkpoint, in the shape its config says; a tied head need not be."""
    absent, dense = [], set(opened.dense_names)
    for path, parameter in architecture.model.named_parameters():
        name = architecture.stored.find(path)
        if name is None:
            absent += [] if architecture.stored.sources(architecture.stored.owner(path)) else [path]
            continue
        module, wanted = name.removesuffix(".weight"), tuple(parameter.shape)
        stored = tuple(opened.reader.info(name).shape) if name in dense else stored_shape(opened, module) if module in opened.schemes else wanted
        owner = architecture.model.get_submodule(path.rpartition(".")[0])
        if stored != wanted and not (name not in dense and isinstance(owner, Conv1D) and stored == wanted[::-1]):
            what = f"{name} is {list(stored)} where config.json asks for {list(wanted)}"
            raise SourceError(f"{origin.name}: {what}; the two belong to different models")
    if absent:
        raise SourceError(f"{origin.name} lacks {len(absent)} tensors its config promises: {some(absent, 3)}; fetch the model again")
