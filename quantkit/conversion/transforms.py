"""The transforms of one block: where scales can go, which they are, and every tensor of the block as it is once they are folded in.

A norm is rounded to the type it is stored in first, and its readers then take the scale that is really in it, so that storing costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.plan import Plan
from quantkit.conversion.rounding import MIN_TOKENS, finite_weight
from quantkit.methods.base import Reader, Rounding, Statistics, Transform
from quantkit.methods.rtn import SearchedScales
from quantkit.models.architecture import Architecture, Block
from quantkit.models.folding import Change, Found, Run, Site, changes, find_sites
from quantkit.models.streaming import Weights

Group = tuple[list[str], Statistics | None]
"""Linears with one input, by checkpoint name, and what was seen of it."""


@dataclass(eq=False, slots=True)
class FoldedWeights:
    """A block's dense tensors with everything folded so far; the source's own for all others."""

    source: Weights
    changes: dict[str, list[Change]] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def get(self, name: str) -> Tensor:
        """In float32 where something was folded."""
        value = self.source.get(name)
        for change in self.changes.get(name, ()):
            value = change.applied(value)
        return value


@dataclass(eq=False, slots=True)
class Transformed:
    """A block after its transforms.

    Attributes:
        weights: its tensors as they are to be rounded or stored.
        groups: its linears by input, with statistics of the inputs as they are now.
        words: for each layer that has a transform, where its scale went or why nowhere.
    """

    weights: Weights
    groups: Iterable[Group]
    words: dict[str, str] = field(default_factory=dict)


def transform_block(
    block: Block, architecture: Architecture, plan: Plan, source: Weights, groups: Iterable[Group], run: Run, model_dtype: torch.dtype
) -> Transformed:
    """Choose and fold a scale for every group of linears that has a transform and a place for one.

    Args:
        run: a forward pass of the block over a few tokens.
    """
    wanted, found = sites_of(block, architecture, plan, run)
    done = Transformed(FoldedWeights(source), list(groups), {})
    for path, name in wanted.items():
        done.words[name] = f"{_label(plan, name)} nowhere: {found.why_not[path]}" if path in found.why_not else ""
    scale_dtype = plan.format.scale_dtype(model_dtype)
    for site in found.sites:
        names = [wanted[path] for path in site.readers if path in wanted]
        readers = _readers(plan, done, names, scale_dtype)
        if readers:
            _fold(site, readers, block, architecture, plan, done, names)
        else:
            done.words |= {name: f"{_label(plan, name)} nowhere: too few calibration tokens reached it" for name in names}
    return done


def sites_of(block: Block, architecture: Architecture, plan: Plan, run: Run) -> tuple[dict[str, str], Found]:
    """The block's linears that have a transform, checkpoint names by path in the block, and where their scales can go."""
    wanted = {linear.path.removeprefix(f"{block.path}."): linear.name for linear in block.linears if transform_of(plan, linear.name) is not None}
    return wanted, find_sites(block.module, list(wanted), run, _fixed(block, architecture, plan))


def transform_of(plan: Plan, name: str) -> Transform | None:
    return plan.layers[name].transform if name in plan.layers else None


def _label(plan: Plan, name: str) -> str:
    return type(plan.layers[name].transform).__name__


def _fixed(block: Block, architecture: Architecture, plan: Plan) -> Callable[[str], str | None]:
    """Why a parameter of the block cannot be rewritten, or None."""

    def why(parameter: str) -> str | None:
        path = f"{block.path}.{parameter}"
        name = architecture.stored.find(path)
        if name is None:
            return f"{parameter} is stored as {', '.join(architecture.stored.sources(path)[:3]) or 'nothing'}"
        if architecture.stored.is_tied(path) or (name not in plan.moved.get(block.path, ()) and name.removesuffix(".weight") not in plan.layers):
            return f"{parameter} is shared with another part of the model"
        return None

    return why


def _fold(
    site: Site, readers: Sequence[Reader], block: Block, architecture: Architecture, plan: Plan, done: Transformed, wanted: Sequence[str]
) -> None:
    """Choose one site's scale and fold it. Of several transforms the first in the block's order decides, and all readers follow."""
    transform = plan.layers[wanted[0]].transform
    assert transform is not None
    scale = transform.scale(readers, site.index, site.num_scales).cpu()
    stored = {parameter: architecture.stored.find(f"{block.path}.{parameter}") or "" for parameter in _parameters(block, site)}
    if not _keeps_precision(site, stored, plan):
        scale = scale.log2().round().exp2()
    if site.rows is None:
        scale = _as_stored(site, scale, stored[f"{site.source}.weight"], plan, done.weights)
    for change in changes(block.module, site, scale):
        done.weights.changes.setdefault(stored[change.parameter], []).append(change)
    spread = scale[site.index]
    names = {linear.path.removeprefix(f"{block.path}."): linear.name for linear in block.linears}
    divided = {names.get(reader) for reader in site.readers}
    done.groups = [(group, s.divided(spread.to(s.hessian.device)) if s is not None and group[0] in divided else s) for group, s in done.groups]
    done.words |= {name: f"{_label(plan, name)} into {block.path}.{site.source}" for name in wanted}


def _parameters(block: Block, site: Site) -> list[str]:
    return [change.parameter for change in changes(block.module, site, torch.ones(site.num_scales))]


def _keeps_precision(site: Site, stored: dict[str, str], plan: Plan) -> bool:
    """Whether any scale will do: matrices that stay as they are in 16 bits (routers, mostly) take none but powers of two without an error."""
    alone = [name for parameter, name in stored.items() if name.removesuffix(".weight") not in plan.layers]
    matrices = [plan.planned[name] for name in alone if len(plan.planned[name].shape) > 1]
    return all(tensor.dtype.itemsize > 2 for tensor in matrices)


def _readers(plan: Plan, done: Transformed, wanted: Sequence[str], scale_dtype: torch.dtype) -> list[Reader]:
    """One for each input, of those linears that have a transform; linears of unlike schemes, or whose groups span rows, are looked at apart."""
    readers = []
    for names, statistics in done.groups:
        alike: dict[tuple[str, Rounding, str], list[LayerPlan]] = {}
        for layer in (plan.layers[name] for name in names if name in wanted):
            apart = layer.linear.name if layer.scheme.weight is not None and layer.scheme.weight.spans_rows else ""
            alike.setdefault((layer.scheme.name, layer.rounding, apart), []).append(layer)
        for layers in alike.values():
            if statistics is None or statistics.num_tokens < MIN_TOKENS:
                continue
            spec = layers[0].scheme.weight
            assert spec is not None
            weight = torch.cat([finite_weight(layer, done.weights) for layer in layers]).to(statistics.hessian.device)
            rounding = SearchedScales() if layers[0].rounding.needs_calibration else layers[0].rounding
            readers.append(Reader(weight, statistics, spec, rounding, scale_dtype))
    return readers


def _as_stored(site: Site, scale: Tensor, name: str, plan: Plan, weights: FoldedWeights) -> Tensor:
    """The scale that a norm's gains really have been divided by once they are stored; 1 where a gain is 0."""
    gain = weights.get(name).float() + site.offset
    kept = ((gain / scale) - site.offset).to(plan.planned[name].dtype).float() + site.offset
    return torch.where((gain != 0) & (kept / gain > 0), gain / kept, torch.ones_like(gain))
