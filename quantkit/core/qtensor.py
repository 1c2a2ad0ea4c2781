"""The one type that methods produce, containers encode and kernels consume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from quantkit.core.groups import expanded
from quantkit.core.levels import level_of
from quantkit.core.scales import NESTED_BLOCK, NestedScales, stored_dtype
from quantkit.core.scheme import QuantSpec
from quantkit.errors import UsageError

LLM_INT8_STEP = 7.874015748031496e-3
"""1 / 127, the step that LLM.int8 multiplies by."""


@dataclass(eq=False, slots=True)
class QuantizedTensor:
    """A weight [N, K] as codes and scales: weight = level(code) * scale, where an integer's level is code - zero.

    Attributes:
        spec: grid, groups, and how scales are stored.
        codes: uint8 [N, K] in [0, 2**bits), in the column order of the original weight; floats as their bit patterns.
        scale: as stored, of the shape `spec.scale_shape(N, K)`: [R, G], or [S] for flat blocks.
        zero: uint8 or int16 [N, G] in the codes' units, or None for a symmetric grid, whose zero is 2**(bits-1).
        group_of_column: int32 [K], the group of every column where groups are not runs of columns (act-order files of others), else None.
        divisor: float32 [1], what 8-bit scales are divided by (NVFP4), else None.
        nested: what 8-bit codes of scales stand for (double quantization), else None.
        input_scale: float [1], the calibrated scale of the layer's input where activations are quantized by one, else None.
    """

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_of_column: Tensor | None = None
    divisor: Tensor | None = None
    nested: NestedScales | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        assert self.scale.shape == self.spec.scale_shape(rows, columns), (self.scale.shape, self.spec, self.codes.shape)
        assert (self.zero is None) == self.spec.symmetric
        assert self.zero is None or self.zero.shape == self.scale.shape
        assert (self.divisor is None) == (self.spec.scale != "e4m3")
        assert (self.nested is None) == (self.spec.scale != "nested")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return tuple(self.codes.shape)

    @property
    def scales(self) -> Tensor:
        """What levels are multiplied by, float32, in the shape of `scale`."""
        if self.nested is not None:
            return self.nested.scales(self.scale)
        return self.scale.float() if self.divisor is None else self.scale.float() / self.divisor

    def expand(self, per_group: Tensor) -> Tensor:
        """A tensor of the shape of `scale` stretched to [N, K]."""
        if self.group_of_column is not None:
            return per_group[:, self.group_of_column.long()]
        return expanded(per_group, self.spec, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in float32 from what is stored."""
        zero: Tensor | int = self.spec.mid_code if self.zero is None else self.expand(self.zero).float()
        values = level_of(self.codes, self.spec, zero) * self.expand(self.scales)
        return (values * LLM_INT8_STEP if self.spec.scale == "row maximum" else values).to(dtype)

    def equals(self, other: QuantizedTensor) -> bool:
        """Bit for bit the same spec and the same tensors."""
        return self.spec == other.spec and all(_same(a, b) for a, b in zip(self._tensors(), other._tensors(), strict=True))

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Some of the rows, as a tensor of their own.

        Raises:
            UsageError: they share scales with other rows in a way that cannot be taken apart.
        """
        of: slice | None = slice(start, stop)
        if isinstance(self.spec.group, tuple):
            size = self.spec.group[0]
            if start % size or (stop % size and stop != self.shape[0]):
                raise UsageError(f"rows {start} to {stop} cut a block of {size}; take whole blocks")
            of = slice(start // size, -(-stop // size))
        elif self.spec.is_flat:
            if start or stop != self.shape[0]:
                raise UsageError(f"rows {start} to {stop} of {self.spec.kind} weights cannot be taken apart: blocks run over the ends of rows")
            of = None
        elif self.spec.group is None:
            of = None
        scale, zero = (None if t is None else t if of is None else t[of].contiguous() for t in (self.scale, self.zero))
        return replace(self, codes=self.codes[start:stop].contiguous(), scale=scale, zero=zero)

    def columns(self, start: int, stop: int) -> QuantizedTensor:
        """Some of the columns, whole groups of them, as a tensor of their own.

        Raises:
            UsageError: the range cuts a group, or groups are not runs of columns.
        """
        size = self.spec.group_size(self.codes.shape[1])
        if self.group_of_column is not None:
            raise UsageError("columns of a weight whose groups are scattered over them (act-order) cannot be taken apart; divide its rows")
        if self.spec.is_flat:
            raise UsageError(f"columns of {self.spec.kind} weights cannot be taken apart: blocks run over the ends of rows")
        is_whole_row = self.scale.shape[1] == 1
        if not is_whole_row and (start % size or stop % size):
            raise UsageError(f"columns {start} to {stop} cut a group of {size}; take whole groups")
        of = slice(None) if is_whole_row else slice(start // size, stop // size)
        zero = None if self.zero is None else self.zero[:, of].contiguous()
        codes, scale = self.codes[:, start:stop].contiguous(), self.scale[:, of].contiguous()
        return replace(self, spec=self._spec_of_part(stop - start), codes=codes, scale=scale, zero=zero)

    def _spec_of_part(self, columns: int) -> QuantSpec:
        """One group over all columns is one over fewer of them too."""
        group = self.spec.group
        return replace(self.spec, group=columns) if isinstance(group, int) and group > columns and self.scale.shape[1] == 1 else self.spec

    def to(self, device: torch.device | str) -> QuantizedTensor:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | NestedScales)})

    def _tensors(self) -> list[Tensor | None]:
        nested = (None, None, None) if self.nested is None else (self.nested.outer, self.nested.offset, self.nested.table)
        return [self.codes, self.scale, self.zero, self.group_of_column, self.divisor, *nested, self.input_scale]


def empty(spec: QuantSpec, shape: Sequence[int], scale_dtype: torch.dtype, device: torch.device | str) -> QuantizedTensor:
    """A tensor of [N, K] without values, plain scales in `scale_dtype`."""
    rows, columns = shape
    per_group = spec.scale_shape(rows, columns)

    def room(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    nested = None
    if spec.scale == "nested":
        outer = room((-(-per_group[0] // NESTED_BLOCK),), torch.float32)
        nested = NestedScales(outer, room((), torch.float32), room((256,), torch.float32))
    return QuantizedTensor(
        spec, room((rows, columns), torch.uint8), room(per_group, stored_dtype(spec, scale_dtype)),
        zero=None if spec.symmetric else room(per_group, torch.int16),
        divisor=room((1,), torch.float32) if spec.scale == "e4m3" else None,
        nested=nested,
    )  # fmt: skip


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))


def _bits(tensor: Tensor) -> Tensor:
    """8-bit floats have no comparison of their own."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
