"""Launcher of the native products with weights of up to 8 bits in groups, integers or floats: pack once, then check, allocate, call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_kernels.cpu.build import library
from quantkit_kernels.reference import every_e4m3

ROWS, BLOCK, HALF_BLOCK = 16, 32, 16
RUNS = (128, 64, 32)
"""Columns that one scale of 8-bit activations serves: the most that divide K and are whole groups, or divide a group."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = ("int4", "int8", "table4", "e4m3")
_TILES_AT_ONCE = 64


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "scales", "zeros", "levels", "whole")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "group", "stretch", "run")),
        ("unit", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "middle", "type", "exact")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns] in tiles of 16 rows, the last one filled up; codes of up to 4 bits two in a byte (see the C++ file).

    Attributes:
        levels, whole, unit: of codes that a table is for: what they stand for as float32 [16]; the same as uint8 [16], rounded to whole `unit`s
            and 128 more.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int
    group: int
    kind: str
    middle: int
    levels: Tensor | None = None
    whole: Tensor | None = None
    unit: float = 1.0


def why_not(columns: int, group: int, bits: int, *, exact: bool = True) -> str | None:
    """Why the native kernel does not take a weight of these sizes here, or None when it does.

    Args:
        exact: as of `linear`. 8-bit floats have no other way.
    """
    if columns % max(group, BLOCK) or (group % BLOCK and not (exact and group == HALF_BLOCK)):
        few = "" if not exact else f" (or of {HALF_BLOCK}, in whole blocks of {BLOCK})"
        return f"{columns} columns in groups of {group}; it takes whole groups of multiples of {BLOCK}{few}"
    if not 1 <= bits <= 8:
        return f"codes of {bits} bits; it takes up to 8"
    return None if library("low_bit_linear") is not None else "no library"


def pack(codes: Tensor, scale: Tensor, zero: Tensor | int, bits: int, levels: Tensor | None = None) -> Packed:
    """Codes uint8 [N, K] and their scales as the kernel reads them.

    Args:
        scale: [N, G] in a floating-point type.
        zero: of integers, the codes that mean nothing, [N, G] or one for all.
        levels: what the codes of 4-bit floats or tables stand for, [16]; or the 256 values of torch.float8_e4m3fn. None for integers.

    Raises:
        ValueError: other levels.
    """
    (rows, columns), stored = codes.shape, 4 if bits <= 4 else 8
    kind = f"int{stored}" if levels is None else "table4" if len(levels) == 16 else "e4m3"
    if kind == "e4m3" and not torch.equal(levels.nan_to_num(), every_e4m3().nan_to_num()):  # type: ignore[union-attr]
        raise ValueError(f"levels are {len(levels)}; the kernel takes 16, or the 256 of torch.float8_e4m3fn")  # type: ignore[arg-type]
    tiles = -(-rows // ROWS)
    packed = torch.empty(tiles, columns // BLOCK, ROWS * BLOCK * stored // 8, dtype=torch.uint8)
    for first in range(0, tiles, _TILES_AT_ONCE):
        part = _tiled(codes[first * ROWS : (first + _TILES_AT_ONCE) * ROWS]).view(-1, ROWS, columns // BLOCK, 2, 4, 4)
        if stored == 4:
            part = (part[:, :, :, 0] | part[:, :, :, 1] << 4)[:, :, :, None]
        packed[first : first + _TILES_AT_ONCE] = part.permute(0, 2, 3, 4, 1, 5).reshape(-1, *packed.shape[1:])
    scale = scale if scale.dtype in TYPES else scale.float()
    zeros = None if isinstance(zero, int) else _by_group(zero.to(torch.uint8))
    settings = (rows, columns, columns // scale.shape[1], kind)
    if kind == "table4":
        assert levels is not None
        whole, unit = whole_levels(levels)
        return Packed(packed, _by_group(scale), None, *settings, 128, levels.float().contiguous(), whole, unit)
    return Packed(packed, _by_group(scale), zeros, *settings, zero if isinstance(zero, int) else 0)


def whole_levels(levels: Tensor) -> tuple[Tensor, float]:
    """Levels [16] as uint8, whole units and 128 more, and the unit: 1 or 1/2 where those are exact, else a 127th of the largest."""
    top = float(levels.abs().amax())
    unit = next((unit for unit in (1.0, 0.5) if top <= 127 * unit and bool((levels % unit == 0).all())), top / 127)
    return ((levels.double() / unit).round() + 128).to(torch.uint8), unit


def linear(x: Tensor, weight: Packed, *, exact: bool) -> Tensor:
    """[M, K] by the packed weight, float32 [M, N]; a row's result is the same to the bit whatever other rows there are.

    Args:
        exact: multiply float32 activations by float32 weights; otherwise activations are rounded to 8 bits, one scale for each run of columns, and
            levels of a table to 8 bits where these do not hold them.

    Raises:
        ValueError: x is not of K columns on a CPU, or there is only an exact way for the weight.
        MemoryError: there is none for the rounded activations.
    """
    if x.dim() != 2 or x.shape[1] != weight.columns or x.device.type != "cpu":
        raise ValueError(f"low_bit_linear takes [M, {weight.columns}] on a CPU, not {list(x.shape)} on {x.device}")
    if not exact and (weight.kind == "e4m3" or weight.group < BLOCK):
        raise ValueError(f"low_bit_linear multiplies {weight.kind} in groups of {weight.group} by float32 activations alone; ask for exact=True")
    native = library("low_bit_linear")
    assert native is not None
    x = x.float().contiguous()
    y = torch.empty(len(x), weight.rows)
    if not y.numel():
        return y
    tensors = (x, y, weight.codes, weight.scales, weight.zeros, weight.levels, weight.whole)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    stretch = next((run for run in RUNS if weight.group % run == 0), BLOCK)
    run = next(run for run in RUNS if run % stretch == 0 and weight.columns % run == 0)
    sizes = (len(x), weight.rows, weight.columns, weight.group, stretch, run)
    call = _Call(*pointers, *sizes, weight.unit, _KINDS.index(weight.kind), weight.middle, TYPES[weight.scales.dtype], exact)
    if native.low_bit_linear(ctypes.byref(call)):
        raise MemoryError("no memory for activations of 8 bits")
    return y


def _tiled(rows: Tensor) -> Tensor:
    """[N, ...], rows of zeros behind the last up to a whole tile."""
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, -len(rows) % ROWS))


def _by_group(values: Tensor) -> Tensor:
    """[N, G] as [tiles, G, 16]."""
    return _tiled(values).view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
