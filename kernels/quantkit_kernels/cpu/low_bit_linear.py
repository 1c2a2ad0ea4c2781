"""Launcher of the native products with weights of up to 8 bits in groups: pack once, then check, allocate, call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_kernels.cpu.build import library

ROWS, BLOCK = 16, 32
RUNS = (128, 64, 32)
"""Columns that one scale of 8-bit activations serves: the most that divide a group."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TILES_AT_ONCE = 64


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "group", "run")),
        *((name, ctypes.c_int32) for name in ("bits", "middle", "type", "exact")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns] in tiles of 16 rows, the last one filled up; codes of up to 4 bits two in a byte (see the C++ file)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int
    middle: int


def why_not(columns: int, group: int, bits: int) -> str | None:
    """Why the native kernel does not take a weight of these sizes here, or None when it does."""
    if group % BLOCK or columns % group:
        return f"{columns} columns in groups of {group}; it takes whole groups of multiples of {BLOCK}"
    if not 1 <= bits <= 8:
        return f"codes of {bits} bits; it takes up to 8"
    return None if library("low_bit_linear") is not None else "no library"


def pack(codes: Tensor, scale: Tensor, zero: Tensor | int, bits: int) -> Packed:
    """Codes uint8 [N, K], scale [N, G] in a floating-point type and zero points [N, G], or one, in codes' units, as the kernel reads them."""
    (rows, columns), stored = codes.shape, 4 if bits <= 4 else 8
    tiles = -(-rows // ROWS)
    packed = torch.empty(tiles, columns // BLOCK, ROWS * BLOCK * stored // 8, dtype=torch.uint8)
    for first in range(0, tiles, _TILES_AT_ONCE):
        part = _tiled(codes[first * ROWS : (first + _TILES_AT_ONCE) * ROWS]).view(-1, ROWS, columns // BLOCK, 2, 4, 4)
        if stored == 4:
            part = (part[:, :, :, 0] | part[:, :, :, 1] << 4)[:, :, :, None]
        packed[first : first + _TILES_AT_ONCE] = part.permute(0, 2, 3, 4, 1, 5).reshape(-1, *packed.shape[1:])
    scale = scale if scale.dtype in TYPES else scale.float()
    zeros = None if isinstance(zero, int) else _by_group(zero.to(torch.uint8))
    return Packed(packed, _by_group(scale), zeros, rows, columns, columns // scale.shape[1], stored, zero if isinstance(zero, int) else 0)


def linear(x: Tensor, weight: Packed, *, exact: bool) -> Tensor:
    """[M, K] by the packed weight, float32 [M, N]; a row's result is the same to the bit whatever other rows there are.

    Args:
        exact: multiply float32 activations by float32 weights; otherwise activations are rounded to 8 bits, one scale for each run of columns.

    Raises:
        ValueError: x is not of K columns on a CPU.
        MemoryError: there is none for the rounded activations.
    """
    if x.dim() != 2 or x.shape[1] != weight.columns or x.device.type != "cpu":
        raise ValueError(f"low_bit_linear takes [M, {weight.columns}] on a CPU, not {list(x.shape)} on {x.device}")
    native = library("low_bit_linear")
    assert native is not None
    x = x.float().contiguous()
    y = torch.empty(len(x), weight.rows)
    if not y.numel():
        return y
    pointers = (None if t is None else t.data_ptr() for t in (x, y, weight.codes, weight.scales, weight.zeros))
    run = next(run for run in RUNS if weight.group % run == 0)
    sizes = (len(x), weight.rows, weight.columns, weight.group, run)
    call = _Call(*pointers, *sizes, weight.bits, weight.middle, TYPES[weight.scales.dtype], exact)
    if native.low_bit_linear(ctypes.byref(call)):
        raise MemoryError("no memory for activations of 8 bits")
    return y


def _tiled(rows: Tensor) -> Tensor:
    """[N, ...], rows of zeros behind the last up to a whole tile."""
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, -len(rows) % ROWS))


def _by_group(values: Tensor) -> Tensor:
    """[N, G] as [tiles, G, 16]."""
    return _tiled(values).view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
