"""The one type that methods produce, containers encode and kernels consume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.quantize import Grid
from quantkit.core.scheme import QuantSpec
from quantkit.errors import UsageError


@dataclass(eq=False, slots=True)
class QuantizedTensor:
    """A weight [N, K] as unsigned codes and scales: weight = (codes - zero) * scale, group by group along K.

    Attributes:
        spec: bits, group and symmetry.
        codes: uint8 [N, K] in [0, 2**bits), in the column order of the original weight.
        scale: [N, G] in the type that is stored.
        zero: uint8 or int16 [N, G] in the codes' units, or None for a symmetric grid, whose zero is 2**(bits-1).
        group_of_column: int32 [K], the group of every column where groups are not runs of columns (act-order files of others), else None.
    """

    spec: QuantSpec
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_of_column: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = self.spec.num_groups(columns)
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        assert self.scale.shape == (rows, groups), (self.scale.shape, rows, groups)
        assert (self.zero is None) == self.spec.symmetric
        assert self.zero is None or self.zero.shape == self.scale.shape

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return tuple(self.codes.shape)

    def expand(self, per_group: Tensor) -> Tensor:
        """A [N, G] tensor stretched to [N, K]."""
        if self.group_of_column is not None:
            return per_group[:, self.group_of_column.long()]
        return per_group.repeat_interleave(self.spec.group_size(self.codes.shape[1]), dim=1)[:, : self.codes.shape[1]]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in float32 from what is stored."""
        zero: Tensor | int = self.spec.mid_code if self.zero is None else self.expand(self.zero).float()
        return ((self.codes.float() - zero) * self.expand(self.scale).float()).to(dtype)

    def equals(self, other: QuantizedTensor) -> bool:
        """Bit for bit the same spec, codes, scales, zeros and column groups."""
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero), (self.group_of_column, other.group_of_column))
        return self.spec == other.spec and all(_same(a, b) for a, b in pairs)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Some of the rows, as a tensor of their own."""
        zero = None if self.zero is None else self.zero[start:stop].contiguous()
        return QuantizedTensor(self.spec, self.codes[start:stop].contiguous(), self.scale[start:stop].contiguous(), zero, self.group_of_column)

    def columns(self, start: int, stop: int) -> QuantizedTensor:
        """Some of the columns, whole groups of them, as a tensor of their own.

        Raises:
            UsageError: the range cuts a group, or groups are not runs of columns.
        """
        size = self.spec.group_size(self.codes.shape[1])
        if self.group_of_column is not None:
            raise UsageError("columns of a weight whose groups are scattered over them (act-order) cannot be taken apart; divide its rows")
        is_whole_row = self.scale.shape[1] == 1
        if not is_whole_row and (start % size or stop % size):
            raise UsageError(f"columns {start} to {stop} cut a group of {size}; take whole groups")
        of = slice(None) if is_whole_row else slice(start // size, stop // size)
        zero = None if self.zero is None else self.zero[:, of].contiguous()
        return QuantizedTensor(self._spec_of_part(stop - start), self.codes[:, start:stop].contiguous(), self.scale[:, of].contiguous(), zero)

    def _spec_of_part(self, columns: int) -> QuantSpec:
        """One group over all columns is one over fewer of them too."""
        group = self.spec.group
        return replace(self.spec, group=columns) if group is not None and group > columns and self.scale.shape[1] == 1 else self.spec

    def to(self, device: torch.device | str) -> QuantizedTensor:
        moved = [None if t is None else t.to(device) for t in (self.codes, self.scale, self.zero, self.group_of_column)]
        return QuantizedTensor(self.spec, *moved)


def from_grid(spec: QuantSpec, codes: Tensor, grid: Grid, scale_dtype: torch.dtype) -> QuantizedTensor:
    """A quantized tensor of codes [N, K] and a grid [N, G, 1], both float32."""
    zero = None if spec.symmetric else grid.zero.squeeze(-1).to(torch.int16)
    return QuantizedTensor(spec, codes.to(torch.uint8), grid.scale.squeeze(-1).to(scale_dtype), zero)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)
