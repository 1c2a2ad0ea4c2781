"""Where a scale per input channel of some linears can go so that a block computes the same: into the norm or the linear that feeds them.

No table of families. One forward pass shows which modules read a norm's output and which linear runs before which; that a linear's outputs reach
an input channel by channel is seen by scaling them (Llama's up to down, v to o shared by a key-value head's queries, the halves of a fused
projection). What is found is then proved: scales are folded and the block's output must stay what it was. Scales tried are powers of two, which
rounding does not touch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Run = Callable[[], Tensor]
"""One forward pass of the block over the same few tokens; its hidden states."""


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """A place that takes the inverse of a scale, and every module that must take the scale itself. Paths are relative to the block.

    Attributes:
        source: the norm or linear that is divided.
        readers: modules whose input channels are multiplied.
        index: int64 [K], which of the M scales input channel k has.
        rows: int64 [M], the output of a linear source that scale m divides; None for a norm, whose K gains all have their own.
        offset: a norm's gain is `offset + weight`.
    """

    source: str
    readers: tuple[str, ...]
    index: Tensor
    rows: Tensor | None = None
    offset: float = 0.0

    @property
    def num_scales(self) -> int:
        return len(self.index) if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """What folding does to one parameter: its gain, `offset` more than its value, is multiplied by `factor`, broadcast to it."""

    parameter: str
    factor: Tensor
    offset: float = 0.0

    def applied(self, value: Tensor) -> Tensor:
        """In float32."""
        factor = self.factor.to(value.device)
        return (value.float() + self.offset) * factor - self.offset


@dataclass(eq=False, slots=True)
class Found:
    """Sites of one block, and for every linear that was asked for and has none the reason."""

    sites: list[Site]
    why_not: dict[str, str]


@dataclass(eq=False, slots=True)
class Call:
    """What one module was given and gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.args[0] if self.args else next(iter(self.kwargs.values()))


def find_sites(block: nn.Module, wanted: Sequence[str], run: Run, fixed: Callable[[str], str | None] = lambda parameter: None) -> Found:
    """The sites for linears `wanted`, by path in the block, each proved by a forward pass. The block's weights are as before afterwards.

    Args:
        fixed: why a parameter, by its path in the block, must keep its value; None where it need not.
    """
    calls, output = observe(block, run)
    hidden = [name for name, module in matrices(block) if name not in calls]
    found, why_not = norm_sites(calls, hidden), {}
    siblings: dict[str, Site | str] = {}
    for name in wanted:
        if any(name in site.readers for site in found):
            continue
        kin = starred(name)
        if kin not in siblings and name in calls:
            siblings[kin] = linear_site(block, name, calls, run)
        like = siblings.get(kin, "no token of the probe reached it")
        site = _moved(like, name) if isinstance(like, Site) else None
        if site is None:
            why_not[name] = str(like)
        else:
            found.append(site)
    return _proved(block, [site for site in found if set(site.readers) & set(wanted)], set(wanted), run, output, fixed, why_not)


def changes(block: nn.Module, site: Site, scale: Tensor) -> list[Change]:
    """What folding a scale [M] does to the block's parameters: readers are multiplied, the source is divided."""
    source = block.get_submodule(site.source)
    inverse = scale.reciprocal()
    if site.rows is not None:
        whole = torch.ones(source.bias.shape[0] if source.bias is not None else num_outputs(source), device=scale.device)
        whole[site.rows.to(scale.device)] = inverse
        inverse = whole
    made = [Change(f"{site.source}.weight", _along_outputs(source, inverse) if site.rows is not None else inverse, site.offset)]
    if getattr(source, "bias", None) is not None:
        made.append(Change(f"{site.source}.bias", inverse))
    spread = scale[site.index.to(scale.device)]
    for reader in site.readers:
        made.append(Change(f"{reader}.weight", spread[:, None] if isinstance(block.get_submodule(reader), Conv1D) else spread[None]))
    return made


def observe(block: nn.Module, run: Run) -> tuple[dict[str, Call], Tensor]:
    """The last call of every module with a weight of its own, in the order of their first, and the block's output."""
    calls: dict[str, Call] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            handles.append(module.register_forward_hook(_recorder(calls, name), with_kwargs=True))
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _recorder(calls: dict[str, Call], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if args or kwargs:
            calls[name] = Call(module, args, kwargs, output.detach().clone())

    return hook


def matrices(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in block.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]


def norm_sites(calls: dict[str, Call], hidden: list[str]) -> list[Site]:
    """A norm and all modules with a matrix that were given rows of its output; those the probe did not reach go with their like."""
    sites = []
    for name, call in calls.items():
        weight = call.module.weight
        if weight.ndim != 1 or call.output.shape[-1:] != weight.shape:
            continue
        readers = [other for other, reader in calls.items() if reader.module.weight.ndim == 2 and _reads(reader, call.output)]
        readers += [other for other in hidden if starred(other) in {starred(reader) for reader in readers}]
        offset = _gain_offset(call) if readers else None
        if offset is not None:
            sites.append(Site(name, tuple(readers), torch.arange(len(weight)), offset=offset))
    return sites


def _reads(call: Call, given: Tensor) -> bool:
    """Whether all rows that the module was given are rows of this tensor."""
    x, width = call.x, given.shape[-1]
    if not isinstance(x, Tensor) or x.shape[-1] != width or not x.numel():
        return False
    x, given = x.reshape(-1, width), given.reshape(-1, width)
    return torch.equal(x, given) or bool((x[:, None] == given[None]).all(-1).any(1).all())


def _gain_offset(call: Call) -> float | None:
    """0 where a norm's gain is its weight, 1 where it is one more than that, None where it is neither."""
    scale = _powers_of_two(len(call.module.weight), call.output.device)
    bias = getattr(call.module, "bias", None)
    for offset in (0.0, 1.0):
        parts = [(call.module.weight, Change("weight", scale, offset)), *([(bias, Change("bias", scale))] if bias is not None else [])]
        with _changed(parts):
            output = call.module(*call.args, **call.kwargs)
        if _is_close(output[0] if isinstance(output, tuple) else output, call.output * scale, call.output):
            return offset
    return None


def linear_site(block: nn.Module, reader: str, calls: dict[str, Call], run: Run) -> Site | str:
    """The nearest linear before whose outputs reach this one's input channel by channel, or why there is none."""
    before = list(calls)[: list(calls).index(reader)]
    expected = calls[reader].x
    for name in reversed(before):
        module = calls[name].module
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        for rows in _feeding_rows(num_outputs(module), expected.shape[-1]):
            index = _index(block, name, rows, reader, expected, run)
            if index is not None:
                readers = tuple(other for other, call in calls.items() if call.module.weight.ndim == 2 and call.x is expected)
                return Site(name, readers, index, rows)
    return "it follows no norm with gains, and no linear whose outputs reach its input unbent"


def _feeding_rows(outputs: int, channels: int) -> Iterator[Tensor]:
    """Outputs that may feed this many input channels: all, the values behind queries and keys, either half."""
    sizes = [(0, outputs), ((outputs + channels) // 2, outputs), (outputs // 2, outputs), (0, outputs // 2)]
    for start, end in dict.fromkeys(sizes):
        if 0 <= start < end and channels % (end - start) == 0:
            yield torch.arange(start, end)


def _index(block: nn.Module, source: str, rows: Tensor, reader: str, expected: Tensor, run: Run) -> Tensor | None:
    """Which of the rows feeds each input channel: scaling the rows must scale the channels, and nothing else."""
    scale = _powers_of_two(len(rows), expected.device)
    whole = torch.ones(num_outputs(block.get_submodule(source)), device=expected.device)
    whole[rows.to(expected.device)] = scale
    seen: list[Tensor] = []
    handles = [
        block.get_submodule(source).register_forward_hook(lambda module, args, output: output * whole.to(output.dtype)),
        block.get_submodule(reader).register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for index in _repetitions(len(rows), expected.shape[-1]):
        if seen and seen[-1].shape == expected.shape and _is_close(seen[-1], expected * scale[index.to(scale.device)], expected):
            return index
    return None


def _repetitions(count: int, channels: int) -> Iterator[Tensor]:
    """How `count` rows may be laid over the channels: one each, or heads of a size that divides the count, each for several in turn."""
    times = channels // count
    for size in [count] if times == 1 else [size for size in range(count, 0, -1) if count % size == 0]:
        yield torch.arange(count).view(-1, 1, size).expand(-1, times, -1).reshape(-1)


def _proved(
    block: nn.Module, sites: list[Site], wanted: set[str], run: Run, output: Tensor, fixed: Callable[[str], str | None], why_not: dict[str, str]
) -> Found:
    kept = []
    for site in sites:
        reason = next((why for change in changes(block, site, torch.ones(site.num_scales)) if (why := fixed(change.parameter))), None)
        if reason is None:
            kept.append(site)
        else:
            why_not |= {name: reason for name in site.readers if name in wanted}
    if kept and not _stays(block, kept, run, output):
        failing = [site for site in kept if not _stays(block, [site], run, output)]
        kept = [site for site in kept if site not in failing]
        why_not |= {
            name: f"the block computes something else when scales are folded into {site.source}"
            for site in failing for name in site.readers if name in wanted
        }  # fmt: skip
    return Found(kept, why_not)


def _stays(block: nn.Module, sites: Iterable[Site], run: Run, expected: Tensor) -> bool:
    """Whether the block computes the same with random scales folded."""
    parts = []
    for site in sites:
        for change in changes(block, site, _powers_of_two(site.num_scales, expected.device)):
            parts.append((block.get_parameter(change.parameter), change))
    with _changed(parts):
        return _is_close(run(), expected, expected)


@contextmanager
def _changed(parts: Sequence[tuple[Tensor, Change]]) -> Iterator[None]:
    kept = [(parameter, parameter.data) for parameter, _ in parts]
    try:
        for parameter, change in parts:
            parameter.data = change.applied(parameter.data).to(parameter.dtype)
        yield
    finally:
        for parameter, data in reversed(kept):
            parameter.data = data


def _is_close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Equal but for rounding; `size` says what is large, channel by channel, as a few channels of hidden states are far larger than all others."""
    tolerance = torch.finfo(found.dtype).eps * (512 if found.dtype == torch.float32 else 16)
    width = size.shape[-1]
    largest = size.abs().float().reshape(-1, width).amax(0)
    difference = (found.float() - expected.float()).abs().reshape(-1, width).amax(0)
    return bool((difference <= tolerance * (largest + 0.01 * largest.mean())).all())


def _powers_of_two(count: int, device: torch.device) -> Tensor:
    """From 1/8 to 8, the same at every call."""
    return torch.randint(-3, 4, (count,), generator=torch.Generator().manual_seed(count)).float().exp2().to(device)


def starred(path: str) -> str:
    """A path with its numbers replaced: experts alike in this are alike."""
    return re.sub(r"\b\d+\b", "*", path)


def _moved(site: Site, reader: str) -> Site | None:
    """A linear's site for another module of the same kind, such as the next expert."""
    if reader in site.readers:
        return site
    numbers = dict(zip(re.findall(r"\b\d+\b", site.readers[0]), re.findall(r"\b\d+\b", reader), strict=True))
    source = re.sub(r"\b\d+\b", lambda found: numbers.get(found[0], found[0]), site.source)
    return replace(site, source=source, readers=(reader,))


def num_outputs(module: nn.Module) -> int:
    return module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0]


def _along_outputs(module: nn.Module, factor: Tensor) -> Tensor:
    return factor[None] if isinstance(module, Conv1D) else factor[:, None]
