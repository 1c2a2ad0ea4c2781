"""Whether a stored layer goes into another container as it is: the same codes, scales and zero points on a grid that the container has a name for.

Told from headers, from the columns' order where there is one, and from the scales where their type has to change.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import named
from quantkit.formats.base import Format, KeptTypes
from quantkit.formats.gptq import has_wrapped_zeros
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.stored_layers import stored_shape

_SCALES = ("scales", "weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale",)
_ORDERS = ("g_idx", "weight_g_idx")


def scheme_in(fmt: Format, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
    """What a container calls the layer: the scheme, or the same grid with its zero points written out; None where it has neither."""
    if fmt.why_not(scheme, shape) is None:
        return scheme
    spec = scheme.weight
    if spec is None or spec.kind != "int" or spec.scale != "float" or not spec.symmetric:
        return None
    spelled = named(replace(spec, symmetric=False), scheme.activation)
    return spelled if fmt.why_not(spelled, shape) is None else None


def kept_types(opened: OpenedCheckpoint, module: str, fmt: Format) -> KeptTypes:
    """The types of scales that the container stores for a layer: the source's own where its loaders take them."""
    scale, given = _dtype(opened, module, _SCALES), _dtype(opened, module, _INPUT_SCALES)
    kept = fmt.scale_dtype(opened.dtype) if scale is None else _nearest(scale, fmt)
    return kept, kept if given is None else _nearest(given, fmt)


def obstacle(opened: OpenedCheckpoint, module: str, fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why the layer does not go over as it is, or None where it does."""
    scheme = opened.schemes[module]
    if scheme_in(fmt, scheme, shape) is None:
        return fmt.why_not(scheme, shape)
    if fmt.name not in ("gptq", "gptq-v2") and has_order(opened, module):
        return f"its columns are in activation order (desc_act), which {fmt.name} has no place for"
    if is_ambiguous(opened, module, shape):
        return "it stores a zero point less one as all ones, which is 0 to some loaders of GPTQ v1 and one beyond the highest code to others"
    for (what, parts), kept in zip((("weight", _SCALES), ("input", _INPUT_SCALES)), kept_types(opened, module, fmt), strict=True):
        name = _name(opened, module, parts)
        if name is None or not _may_change(opened.reader.info(name).dtype, kept):
            continue
        scales = opened.reader.get(name)
        if change := _change(scales, kept):
            return f"{fmt.name} stores the scales of its {what} as {_short(kept)}, which changes {change}, stored as {_short(scales.dtype)}"
    return None


def is_ambiguous(opened: OpenedCheckpoint, module: str, shape: tuple[int, int]) -> bool:
    """Whether loaders read zero points of the layer in two ways."""
    spec = opened.schemes[module].weight
    if opened.format is None or opened.format.name != "gptq" or spec is None or spec.symmetric:
        return False
    return has_wrapped_zeros(opened.reader.get(f"{module}.qzeros"), spec.bits, shape[0])


def ambiguity(opened: OpenedCheckpoint) -> str | None:
    """Of layers whose zero points loaders read in two ways: how many, and how they are read here."""
    found = [name for name in opened.schemes if is_ambiguous(opened, name, stored_shape(opened, name))]
    if not found:
        return None
    layers = f"{found[0]} and {len(found) - 1} more layers" if len(found) > 1 else found[0]
    return f"zero points of {layers} are stored less one as all ones: read here as one beyond the highest code, by some loaders of GPTQ v1 as 0"


def has_order(opened: OpenedCheckpoint, module: str) -> bool:
    """Whether the groups of its columns are not runs of columns."""
    name, spec = _name(opened, module, _ORDERS), opened.schemes[module].weight
    if name is None or spec is None:
        return False
    order = opened.reader.get(name)
    plain = torch.arange(len(order), dtype=order.dtype) // spec.group_size(len(order))
    return not torch.equal(order, plain)


def moved(q: QuantizedTensor, scheme: Scheme, kept: KeptTypes) -> QuantizedTensor:
    """The tensor as another container has it: by its scheme there, with scales of these types."""
    spec = scheme.weight
    assert spec is not None
    zero = q.zero
    if zero is None and not spec.symmetric:
        zero = torch.full_like(q.scale, spec.mid_code, dtype=torch.int16)
    scale = q.scale.to(kept[0]) if spec.scale == "float" else q.scale
    return replace(q, spec=spec, scale=scale, zero=zero, input_scale=None if q.input_scale is None else q.input_scale.to(kept[1]))


def _nearest(dtype: torch.dtype, fmt: Format) -> torch.dtype:
    return dtype if dtype in fmt.scale_dtypes else fmt.scale_dtypes[-1]


def _may_change(dtype: torch.dtype, kept: torch.dtype) -> bool:
    """8-bit scales and codes of scales have the type of their scheme, and go to no other."""
    return dtype.is_floating_point and dtype.itemsize > 1 and torch.promote_types(dtype, kept) != kept


def _change(values: Tensor, dtype: torch.dtype) -> str | None:
    """How many of these values another type cannot hold exactly, and how far off the worst is; None where it holds all."""
    before, after = values.float(), values.to(dtype).float()
    changed = before != after
    if not changed.any():
        return None
    off = ((after - before).abs() / before.abs().clamp(min=1e-38))[changed].max()
    return f"{int(changed.sum())} of {changed.numel()} by up to {100 * float(off):.2g}%"


def _name(opened: OpenedCheckpoint, module: str, parts: tuple[str, ...]) -> str | None:
    """The stored tensor of the module that has one of these names."""
    return next((name for part in parts if (name := f"{module}.{part}") in opened.reader), None)


def _dtype(opened: OpenedCheckpoint, module: str, parts: tuple[str, ...]) -> torch.dtype | None:
    name = _name(opened, module, parts)
    return None if name is None else opened.reader.info(name).dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
