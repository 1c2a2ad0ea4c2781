"""What every container does: say what it holds, encode and decode one tensor, and speak its configuration.

A format knows nothing of the methods that made a tensor. The shapes of what it will write come from encoding a tensor on the meta device, so
they are stated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.safetensors_header import TensorInfo
from quantkit.core.qtensor import QuantizedTensor, empty
from quantkit.core.scheme import CHANNEL, QuantSpec, Scheme
from quantkit.errors import FormatError

Infos = Mapping[str, TensorInfo]
"""What the headers say of a layer's tensors, by their names under the module."""
Read = Callable[[str], Tensor]
"""A stored tensor by name."""
_DESCRIBING = ("weight_shape", "weight_format", "weight.quant_map", "weight.nested_quant_map", "weight.quant_state")
KeptTypes = tuple[torch.dtype, torch.dtype]
"""Of a layer's scales, and of the calibrated scale of its input."""


class Format(Protocol):
    """One container. `decode(encode(q), q's scheme)` equals q bit for bit for every scheme it holds."""

    name: str
    holds_conv1d: bool
    """Whether loaders of this container accept a quantized GPT-2 style Conv1D."""
    holds_mixed: bool
    """Whether its layers may have unlike schemes."""
    scale_dtypes: tuple[torch.dtype, ...]
    """The types in which its loaders take plain scales, the widest last."""

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight [N, K] cannot be stored by this scheme, or None when it can."""
        ...

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The type in which scales are stored for a model of this type."""
        ...

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        """The tensors of one layer by their names under the module."""
        ...

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of `encode`; raises FormatError when parts are missing, of the wrong shape, or mean something else than the scheme."""
        ...

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of a checkpoint with these quantized layers and these linears left alone."""
        ...

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        """The scheme of every quantized module of a checkpoint with this quantization_config and these tensor names.

        Args:
            read: gives a tensor by its name in the checkpoint; used for a few bytes where the configuration leaves something open.
        """
        ...

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        """(N, K) of a layer, from its headers; `read` gives a tensor by its name under the module, and is asked for a few bytes at most.

        Raises:
            FormatError: the part that tells is absent.
        """
        ...

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        """Every tensor name, under the module, that may belong to a layer of this scheme."""
        ...


def is_of_weights(name: str) -> bool:
    """Whether a stored tensor is of the weights: codes, scales, zero points, permutations. What else containers write beside a layer, shapes and
    tables that are the same everywhere, is counted among the bytes of files and not among bits a weight.
    """
    return not any(f".{part}" in f".{name}" for part in _DESCRIBING)


@cache
def plan_shapes(
    fmt: Format, scheme: Scheme, shape: tuple[int, int], model_dtype: torch.dtype, kept: KeptTypes | None = None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that `fmt` will write for a weight [N, K], without its values. Thousands of layers have a handful of shapes.

    Args:
        kept: the types of scales that are there already, in place of the format's choice for a model of this type.
    """
    assert scheme.weight is not None
    chosen = fmt.scale_dtype(model_dtype)
    q = blank(scheme, shape, *(kept or (chosen, chosen)))
    return {name: (t.dtype, tuple(t.shape)) for name, t in fmt.encode(q, scheme).items()}


def assembled(
    spec: QuantSpec, codes: Tensor, scale: Tensor, zero: Tensor | None = None, group_of_column: Tensor | None = None, divisor: Tensor | None = None
) -> QuantizedTensor:
    """What `decode` found, put together.

    Raises:
        FormatError: there is not one scale, and zero point, for everything that shares one, or a column is of no group.
    """
    rows, columns = codes.shape
    wanted = list(spec.scale_shape(rows, columns))
    for name, found in (("scales", scale), ("zero points", zero)):
        if found is not None and list(found.shape) != wanted:
            size = spec.group if isinstance(spec.group, tuple) else spec.group_size(columns)
            raise FormatError(f"the {name} are {list(found.shape)}; {rows} x {columns} codes in the config's groups of {size} have {wanted}")
    if group_of_column is not None:
        few, last = list(group_of_column.shape), wanted[1] - 1
        if few != [columns] or not 0 <= int(group_of_column.min()) <= int(group_of_column.max()) <= last:
            ends = "" if not group_of_column.numel() else f", from {int(group_of_column.min())} to {int(group_of_column.max())}"
            raise FormatError(f"g_idx is {few}{ends}; it names the group of each of {columns} columns, from 0 to {last}")
    return QuantizedTensor(spec, codes, scale, zero, group_of_column, divisor)


def blank(scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype, input_scale_dtype: torch.dtype) -> QuantizedTensor:
    """A quantized tensor on the meta device: shapes and types, no values."""
    assert scheme.weight is not None
    q = empty(scheme.weight, shape, scale_dtype, "meta")
    if scheme.is_static:
        q.input_scale = torch.empty(1, dtype=input_scale_dtype, device="meta")
    return q


def require_parts(parts: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raises FormatError where a layer lacks some of its tensors."""
    missing = [name for name in names if name not in parts]
    if missing:
        raise FormatError(f"the layer has no {', '.join(missing)}; it has {', '.join(sorted(parts)) or 'nothing'}")


def why_uneven(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """Why groups or blocks do not fit a weight [N, K], or None when they do."""
    if isinstance(spec.group, tuple):
        high, wide = spec.group
        return f"blocks of {high} x {wide} do not divide {shape[0]} x {shape[1]}" if shape[0] % high or shape[1] % wide else None
    if spec.group in (None, CHANNEL) or spec.is_flat or shape[1] % spec.group == 0:
        return None
    return f"groups of {spec.group} do not divide {shape[1]} input features"
