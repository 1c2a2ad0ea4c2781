"""What every container does: say what it holds, encode and decode one tensor, and speak its configuration.

A format knows nothing of the methods that made a tensor. The shapes of what it will write come from encoding a tensor on the meta device, so
they are stated once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantSpec, Scheme
from quantkit.errors import FormatError


class Format(Protocol):
    """One container. `decode(encode(q), q's scheme)` equals q bit for bit for every scheme it holds."""

    name: str
    holds_conv1d: bool
    """Whether loaders of this container accept a quantized GPT-2 style Conv1D."""

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

    def read_config(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of every quantized module of a checkpoint with this quantization_config and these tensor names."""
        ...

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        """Every tensor name, under the module, that may belong to a layer of this scheme."""
        ...


@cache
def plan_shapes(fmt: Format, scheme: Scheme, shape: tuple[int, int], model_dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that `fmt` will write for a weight [N, K], without its values. Thousands of layers have a handful of shapes."""
    assert scheme.weight is not None
    q = blank(scheme.weight, shape, fmt.scale_dtype(model_dtype))
    return {name: (t.dtype, tuple(t.shape)) for name, t in fmt.encode(q, scheme).items()}


def assembled(
    spec: QuantSpec, codes: Tensor, scale: Tensor, zero: Tensor | None = None, group_of_column: Tensor | None = None
) -> QuantizedTensor:
    """What `decode` found, put together.

    Raises:
        FormatError: there is not one scale, and zero point, for every group of every row.
    """
    rows, columns = codes.shape
    wanted = [rows, spec.num_groups(columns)]
    for name, found in (("scales", scale), ("zero points", zero)):
        if found is not None and list(found.shape) != wanted:
            size = spec.group_size(columns)
            raise FormatError(f"the {name} are {list(found.shape)}; {rows} x {columns} codes in the config's groups of {size} have {wanted}")
    return QuantizedTensor(spec, codes, scale, zero, group_of_column)


def blank(spec: QuantSpec, shape: tuple[int, int], scale_dtype: torch.dtype) -> QuantizedTensor:
    """A quantized tensor on the meta device: shapes and types, no values."""
    rows, columns = shape
    per_group = (rows, spec.num_groups(columns))
    zero = None if spec.symmetric else torch.empty(per_group, dtype=torch.int16, device="meta")
    return QuantizedTensor(spec, torch.empty(shape, dtype=torch.uint8, device="meta"), torch.empty(per_group, dtype=scale_dtype, device="meta"), zero)
