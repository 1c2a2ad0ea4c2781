"""Where a rotation of the hidden states can be folded so that a model computes the same, found by running it with random weights, and proved so.

No table of families. With every linear silent whose output is as wide as the states, what still equals the states is the stream: norms given it
read it, and what reads those norms takes the rotation on its inputs, the norm's gains with it. A linear adds to the stream if what it alone puts
out comes out of the block times a number a token. Then everything is folded, and the block given rotated states must give rotated states. Between
values and the attention's output every head can be rotated too, where the block stays the same; how large a head is, is tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.core.hadamard import Hadamard
from quantkit.models.folding import Call, Run, Site, linear_site, matrices, norm_sites, num_outputs, observe, starred

_AT_ONCE = 1 << 21
"""Numbers of a matrix in float32 at once."""
_TOLERANCE = 1e-4
"""Relative size of a difference that is rounding in float32."""


class DoesNotCommute(Exception):
    """Says of which module, by its path, and why."""


@dataclass(frozen=True, eq=False, slots=True)
class Fold:
    """What a rotation does to one parameter: a matrix [N, K], a Conv1D's turned, or a vector [N].

    Attributes:
        inputs: the rotation of its K inputs.
        gain: the norm's weight whose gains, `offset` more than its values, multiply its inputs first.
        value_heads: the rotation of every head among its outputs, from `rows[0]` to `rows[1]`, before that of all its outputs.
        outputs: the rotation of its outputs.
        becomes: the value that a norm's own weight takes.
    """

    inputs: Hadamard | None = None
    gain: str | None = None
    offset: float = 0.0
    value_heads: Hadamard | None = None
    rows: tuple[int, int] | None = None
    outputs: Hadamard | None = None
    becomes: float | None = None
    is_transposed: bool = False

    def applied(self, value: Tensor, gain: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """In the type, by way of float32; `gain` is what is stored under that name. What reads the stream takes little memory beside its result."""
        if self.becomes is not None:
            return torch.full(value.shape, self.becomes, dtype=dtype)
        value = value.T if self.is_transposed else value
        if gain is not None or self.inputs is not None:
            is_last = self.value_heads is None and self.outputs is None
            value = self._with_inputs_turned(value, gain, dtype if is_last else torch.float32)
        if self.value_heads is not None:
            assert self.rows is not None
            start, end = self.rows
            value = torch.cat([value[:start].float(), _turn_outputs(value[start:end], self.value_heads), value[end:].float()])
        if self.outputs is not None:
            value = _turn_outputs(value, self.outputs)
        return (value.T if self.is_transposed else value).to(dtype).contiguous()

    def _with_inputs_turned(self, value: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = value.reshape(-1, value.shape[-1])
        turned = torch.empty(rows.shape, dtype=dtype, device=value.device)
        step = max(1, _AT_ONCE // rows.shape[1])
        for into, part in zip(turned.split(step), rows.split(step), strict=True):
            part = part.float() if gain is None else part.float() * (gain.float() + self.offset)
            into.copy_(part if self.inputs is None else self.inputs.turn(part))
        return turned.view(value.shape)


Folds = dict[str, Fold]
"""By the parameter's path."""


def _turn_outputs(value: Tensor, rotation: Hadamard) -> Tensor:
    return rotation.turn(value) if value.ndim == 1 else rotation.turn(value.T).T


def find_folds(block: nn.Module, hidden: Tensor, run: Callable[[Tensor], Tensor], rotation: Hadamard, *, with_heads: bool) -> Folds:
    """The folds of one block whose weights are random and loaded; they are as before afterwards.

    Args:
        hidden: [1, T, H], random states.
        run: the block on such states.
        with_heads: rotate values and the attention's output by heads too, where that leaves the block as it is.

    Raises:
        DoesNotCommute: no folds give a block of rotated states.
    """

    def run_here() -> Tensor:
        return run(hidden)

    calls, output = observe(block, run_here)
    adding = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D) and num_outputs(module) == hidden.shape[-1]]
    with _answering(block, dict.fromkeys(adding, 0.0)):
        silent, rest = observe(block, run_here)
    if not torch.equal(rest, hidden):
        raise DoesNotCommute(f"{_unlike_linear(block)}adds to the hidden states, or changes them, and is no linear")
    folds, readers = _reading(block, calls, [name for name, call in silent.items() if _is_norm(call) and _is_given(call, hidden)], rotation)
    writers = _writers(block, calls, [name for name in adding if name not in readers], adding, hidden, run)
    for name in (name for names in writers for name in names):
        folds |= {f"{name}.{leaf}": Fold(outputs=rotation) for leaf in _parameters(block, name)}
    if with_heads:
        for name in (names[0] for names in writers if len(names) == 1 and names[0] in calls):  # not of experts
            site = linear_site(block, name, calls, run_here)
            heads = _heads(block, site, output, run_here, rotation.seed) if isinstance(site, Site) else {}
            folds |= {parameter: _merged(folds.get(parameter), fold) for parameter, fold in heads.items()}
    folds = {name: replace(fold, is_transposed=_is_transposed(block, name)) for name, fold in folds.items()}
    with _folded(block, folds):
        turned = run(rotation.turn(hidden))
    if not is_same(turned - rotation.turn(hidden), rotation.turn(output - hidden)):
        raise DoesNotCommute("it gives other states than the rotated ones when its weights are rotated")
    return folds


def norm_folds(calls: dict[str, Call], norm: str, readers: Sequence[str], offset: float, rotation: Hadamard) -> Folds:
    """A norm of the stream without its gains, and its readers with them.

    Raises:
        DoesNotCommute: the norm does more than to divide by a length, as LayerNorms do.
    """
    call = calls[norm]
    module = call.module
    if getattr(module, "bias", None) is not None:
        raise DoesNotCommute(f"{norm} is a {type(module).__name__} with a bias, which is added channel by channel")
    kept = module.weight.data
    module.weight.data = torch.full_like(kept, 1 - offset)
    try:
        plain, turned = module(call.x), module(rotation.turn(call.x))
    finally:
        module.weight.data = kept
    if not is_same(turned, rotation.turn(plain)):
        more = "does more than divide by the states' length, such as subtracting their mean"
        raise DoesNotCommute(f"{norm} is a {type(module).__name__}, which {more}")
    return {f"{norm}.weight": Fold(becomes=1 - offset)} | {f"{name}.weight": Fold(rotation, f"{norm}.weight", offset) for name in readers}


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, all in all."""
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())


def _reading(block: nn.Module, calls: dict[str, Call], norms: list[str], rotation: Hadamard) -> tuple[Folds, set[str]]:
    """The folds of norms that are given the stream and of what reads them, and the names of the readers."""
    sites = {site.source: site for site in norm_sites(calls, [name for name, _ in matrices(block) if name not in calls])}
    folds: Folds = {}
    for norm in norms:
        if norm not in sites:
            raise DoesNotCommute(f"what {norm} gives is not read by matrices alone, or its gains are not its weight")
        folds |= norm_folds(calls, norm, sites[norm].readers, sites[norm].offset, rotation)
    return folds, {reader for norm in norms for reader in sites[norm].readers}


def _writers(
    block: nn.Module, calls: dict[str, Call], candidates: list[str], adding: list[str], hidden: Tensor, run: Callable[[Tensor], Tensor]
) -> list[list[str]]:
    """The linears that add to the stream, those alike together. Experts alike are tried at once, as no token need reach a given one.

    Raises:
        DoesNotCommute: something that is no number a token lies between a linear and the stream.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in candidates:
        kinds[starred(name)].append(name)
    row = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    found = []
    for names in kinds.values():
        with _answering(block, dict.fromkeys(adding, 0.0) | dict.fromkeys(names, row)):
            change = run(hidden) - hidden
        if not change.any():
            continue
        if not is_same((change @ row / (row @ row))[..., None] * row, change):
            between = next((name for name, call in calls.items() if _is_norm(call) and any(_is_given(call, calls[n].output) for n in names)), None)
            by = f" by {between}, a {type(calls[between].module).__name__}," if between else ""
            raise DoesNotCommute(f"what {names[0]} gives is multiplied channel by channel{by} before it is added to the hidden states")
        found.append(names)
    return found


def _heads(block: nn.Module, site: Site, output: Tensor, run: Run, seed: int) -> Folds:
    """The folds that rotate each head between values and the attention's output: heads as large as they can be; none where there are no heads."""

    def stays(folds: Folds) -> bool:
        with _folded(block, folds):
            return is_same(run(), output)

    count = site.num_scales
    sizes = [size for size in range(2, count + 1) if count % size == 0 and _keeps_together(site.index, size)]
    every = [_head_folds(block, site, Hadamard(size, seed)) for size in sizes]
    if not every or not stays(every[0]):  # what is larger consists of those
        return {}
    return next(folds for folds in reversed(every) if stays(folds))


def _head_folds(block: nn.Module, site: Site, rotation: Hadamard) -> Folds:
    assert site.rows is not None
    rows = (int(site.rows[0]), int(site.rows[-1]) + 1)
    folds = {f"{site.source}.{leaf}": Fold(value_heads=rotation, rows=rows) for leaf in _parameters(block, site.source)}
    folds |= {f"{reader}.weight": Fold(rotation) for reader in site.readers}
    return {name: replace(fold, is_transposed=_is_transposed(block, name)) for name, fold in folds.items()}


def _keeps_together(index: Tensor, size: int) -> bool:
    """Whether channels that belong to one part of the scales, in order, lie side by side."""
    if len(index) % size:
        return False
    parts = index.view(-1, size)
    return bool((parts[:, :1] % size == 0).all() and (parts == parts[:, :1] + torch.arange(size)).all())


def _merged(first: Fold | None, second: Fold) -> Fold:
    if first is None:
        return second
    assert first.inputs is None or second.inputs is None
    return replace(first, inputs=first.inputs or second.inputs, value_heads=second.value_heads, rows=second.rows)


def _is_norm(call: Call) -> bool:
    return call.module.weight.ndim == 1


def _is_given(call: Call, states: Tensor) -> bool:
    return isinstance(call.x, Tensor) and call.x.shape == states.shape and torch.equal(call.x, states)


def _parameters(block: nn.Module, name: str) -> list[str]:
    return [leaf for leaf, _ in block.get_submodule(name).named_parameters(recurse=False)]


def _is_transposed(block: nn.Module, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(block.get_submodule(owner), Conv1D)


def _unlike_linear(block: nn.Module) -> str:
    """The first module that has matrices and is neither a linear nor a plain table of numbers, in words."""
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) and any(p.ndim > 2 for p in module.parameters(recurse=False)):
            return f"{name}, a {type(module).__name__}, "
    return "something "


@contextmanager
def _answering(block: nn.Module, answers: dict[str, Tensor | float]) -> Iterator[None]:
    """Linears that give the same row for every token."""
    handles = [
        block.get_submodule(name).register_forward_hook(lambda module, args, output, row=row: torch.zeros_like(output) + row)
        for name, row in answers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _folded(block: nn.Module, folds: Folds) -> Iterator[None]:
    """With every fold applied; parameters of experts that are one tensor still are."""
    kept = {name: block.get_parameter(name).data for name in folds}
    made: dict[tuple[str, int], Tensor] = {}
    try:
        for name, fold in folds.items():
            key = starred(name), kept[name].data_ptr()
            if key not in made:
                made[key] = fold.applied(kept[name], kept.get(fold.gain) if fold.gain else None)
            block.get_parameter(name).data = made[key]
        yield
    finally:
        for name, data in kept.items():
            block.get_parameter(name).data = data
