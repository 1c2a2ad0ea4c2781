"""What a quantized tensor and a quantized layer are: the grid, what shares a scale, how scales are stored. Settings only, no tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.errors import RecipeError

CHANNEL = -1
DEFAULT_GROUP = 128
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
FLAT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has kernels for."""

Kind = Literal["int", "e4m3", "e2m1", "nf4", "fp4"]
"""The family of the grid: whole numbers, the 8- and 4-bit floats of OCP, or bitsandbytes' two tables of 16 values."""

ScaleKind = Literal["float", "e4m3", "e8m0", "nested", "row maximum"]
"""How scales are stored: in a float type of the container's choice; as 8-bit floats under one float32 a tensor (NVFP4); as powers of two (MX); as
8-bit codes under a float32 for every 256 (double quantization); as the largest magnitude of a row, 127 steps of it (LLM.int8)."""

_BITS_OF_KIND = {"e4m3": 8, "e2m1": 4, "nf4": 4, "fp4": 4}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor is stored.

    Attributes:
        bits: width of one code.
        group: what shares a scale: that many values along the input dimension; CHANNEL (-1) for a row, None for the tensor, a pair for a block of
            rows and columns. For nf4 and fp4 that many values in the order of memory, which may run over the end of a row.
        symmetric: the grid is centred on zero and no zero points are stored.
        kind: the family of the grid.
        scale: how scales are stored.
    """

    bits: int
    group: int | tuple[int, int] | None = DEFAULT_GROUP
    symmetric: bool = True
    kind: Kind = "int"
    scale: ScaleKind = "float"

    def __post_init__(self) -> None:
        if self.kind == "int" and self.bits not in WEIGHT_BITS:
            raise RecipeError(f"{self.bits} bits are not supported; use one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.is_flat and self.group not in FLAT_BLOCKS:
            raise RecipeError(f"block size {self.group} is not supported for {self.kind}; use one of {', '.join(map(str, FLAT_BLOCKS))}")
        if isinstance(self.group, int) and self.group != CHANNEL and self.group < 8:
            raise RecipeError(f"group size {self.group} is not supported; use 8 or more, or -1 for one scale per channel")
        assert self.kind == "int" or (self.bits == _BITS_OF_KIND[self.kind] and self.symmetric)

    @property
    def max_code(self) -> int:
        """The largest unsigned code."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The unsigned code that means zero in a symmetric grid of integers."""
        return 1 << (self.bits - 1)

    @property
    def is_flat(self) -> bool:
        """Scales are shared in the order of memory, over the ends of rows."""
        return self.kind in ("nf4", "fp4")

    @property
    def spans_rows(self) -> bool:
        """Whether rows share scales, so that they cannot be quantized one by one."""
        return self.group is None or isinstance(self.group, tuple) or self.is_flat

    @property
    def shares_range(self) -> bool:
        """Whether something that is stored once a tensor depends on its largest weight: layers that engines join are quantized as one then."""
        return self.group is None or self.scale == "e4m3"

    def group_size(self, in_features: int) -> int:
        """Columns that share one scale in a weight of this many input features."""
        if isinstance(self.group, tuple):
            return self.group[1]
        return in_features if self.group in (None, CHANNEL) else self.group

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size(in_features))

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of a weight [rows, columns]: [R, G], or one dimension for flat blocks."""
        if self.is_flat:
            return (-(-rows * columns // self.group_size(columns)),)
        if self.group is None:
            return 1, 1
        return (-(-rows // self.group[0]) if isinstance(self.group, tuple) else rows), self.num_groups(columns)


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """How a layer's input is quantized at run time, on a symmetric grid.

    Attributes:
        kind: whole numbers, or 8-bit floats.
        group: values of a token that share a scale; CHANNEL for the whole token, None for everything with one scale.
        is_static: the scale was found by calibration and is stored; else each is the range of the values at hand.
        outliers: values of at least this magnitude are not quantized (LLM.int8, arXiv 2208.07339); None quantizes all.
    """

    bits: int = 8
    kind: Literal["int", "e4m3"] = "int"
    group: int | None = CHANNEL
    is_static: bool = False
    outliers: float | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one layer is stored and run. `weight` is None for a layer that is left as it is."""

    name: str
    weight: QuantSpec | None
    activation: ActivationSpec | None = None

    @property
    def is_quantized(self) -> bool:
        return self.weight is not None

    @property
    def is_static(self) -> bool:
        """Whether inputs are quantized by a scale that calibration found."""
        return self.activation is not None and self.activation.is_static


UNQUANTIZED = Scheme("none", None)
