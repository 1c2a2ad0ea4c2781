"""What stands between the products of a decoder, in Triton, each in one pass over memory: sum with RMS norm, rotary positions, gated SiLU.

A row is one program's, or in tiles that do not depend on how many rows there are: its result is equal to the bit in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.ahead_of_time import Configuration

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_WIDTH = 1 << 15
HEADS, COLUMNS = 8, 1024
"""Of a tile of `rotate` and of `silu_mul`."""


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, x_stride, residual_stride, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=is_column, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=is_column, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column, x, mask=is_column)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    tl.store(out_ptr + row * WIDTH + column, x.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, token_stride, head_stride, angle_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_DIMS: tl.constexpr, REST_DIMS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF_DIMS)
    is_dim, is_value = dim < HALF, (head < heads)[:, None] & (dim < HALF)[None, :]
    from_ptr = x_ptr + token * token_stride + head[:, None] * head_stride
    to_ptr = out_ptr + (token * heads + head[:, None]) * HEAD_DIM
    cos = tl.load(cos_ptr + token * angle_stride + dim, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * angle_stride + dim, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    first = tl.load(from_ptr + dim[None, :], mask=is_value, other=0.0).to(tl.float32)  # [HEADS, HALF_DIMS]
    second = tl.load(from_ptr + HALF + dim[None, :], mask=is_value, other=0.0).to(tl.float32)
    tl.store(to_ptr + dim[None, :], (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=is_value)
    tl.store(to_ptr + HALF + dim[None, :], (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=is_value)
    if REST_DIMS:
        dim = 2 * HALF + tl.arange(0, REST_DIMS)
        is_value = (head < heads)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(to_ptr + dim[None, :], tl.load(from_ptr + dim[None, :], mask=is_value, other=0.0), mask=is_value)


@triton.jit
def _silu_mul(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=is_column)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`; rows may lie apart. Without a residual the sum is x itself.

    Raises:
        ValueError: tensors of other types, shapes, strides or devices.
    """
    _check("add_rms_norm", x, *(() if residual is None else (residual,)))
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"add_rms_norm: {width} columns; it takes up to {MAX_WIDTH}")
    if weight.shape != (width,) or weight.dtype not in TYPES or not weight.is_contiguous() or weight.device != x.device:
        raise ValueError(
            f"add_rms_norm: a weight of {weight.dtype} {list(weight.shape)} on {weight.device}; "
            f"it takes a contiguous one of a float type, [{width}] on {x.device}"
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if rows:
        with torch.cuda.device_of(x):
            _add_rms_norm[(rows,)](
                x, residual, weight, total, out, x.stride(0), 0 if residual is None else residual.stride(0), eps,
                WIDTH=width, COLUMNS=triton.next_power_of_2(width), num_warps=_warps(width),
            )  # fmt: skip
    return out, total


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotate`; tokens and heads may lie apart.

    Raises:
        ValueError: tensors of other types, shapes, strides or devices.
    """
    _check("rotate", cos, sin)
    if heads.ndim != 3 or heads.dtype not in TYPES or heads.stride(2) != 1:
        raise ValueError(f"rotate: heads of {heads.dtype} {list(heads.shape)}; it takes a float type, 3 dimensions, the last contiguous")
    (tokens, number, dim), half = heads.shape, cos.shape[1]
    if len(cos) != tokens or 2 * half > dim or cos.device != heads.device or cos.stride() != sin.stride():
        raise ValueError(f"rotate: angles {list(cos.shape)} on {cos.device}; these heads take [{tokens}, up to {dim // 2}] on {heads.device}")
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    rest = dim - 2 * half
    if out.numel():
        with torch.cuda.device_of(heads):
            _rotate[(tokens, triton.cdiv(number, HEADS))](
                heads, cos, sin, out, number, heads.stride(0), heads.stride(1), cos.stride(0), HEAD_DIM=dim, HALF=half,
                HALF_DIMS=triton.next_power_of_2(max(1, half)), REST_DIMS=triton.next_power_of_2(rest) if rest else 0, HEADS=HEADS, num_warps=4,
            )  # fmt: skip
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.silu_mul`; rows may lie apart, as the two halves of one product do.

    Raises:
        ValueError: tensors of other types, shapes, strides or devices.
    """
    _check("silu_mul", gate, up)
    rows, width = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        with torch.cuda.device_of(gate):
            _silu_mul[(rows, triton.cdiv(width, COLUMNS))](
                gate, up, out, width, gate.stride(0), up.stride(0), COLUMNS=COLUMNS, num_warps=4
            )  # fmt: skip
    return out


def _check(operator: str, *same: Tensor) -> None:
    """Matrices of one float type, shape and device with contiguous rows."""
    first = same[0]
    for x in same:
        if x.ndim != 2 or x.dtype not in TYPES or x.stride(1) != 1 or (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{operator}: {x.dtype} {list(x.shape)} of strides {x.stride()} on {x.device}; it takes matrices of one float type, shape and "
                f"device, with contiguous rows: {first.dtype} {list(first.shape)} on {first.device}"
            )


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def shipped() -> Iterator[Configuration]:
    """bfloat16 of the usual widths."""
    for width in (4096, 14336):
        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "sum_ptr", "out_ptr"), "*bf16") | {"weight_ptr": "*fp32", "eps": "fp32"}
        strides = ("x_stride", "residual_stride")
        constants = {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width)}
        yield Configuration(
            f"elementwise add_rms_norm {width} bf16", _add_rms_norm, pointers | dict.fromkeys(strides, "i32"), constants,
            {"num_warps": _warps(width)}, strides,
        )  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "out_ptr"), "*bf16") | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    strides = ("token_stride", "head_stride", "angle_stride")
    constants = {"HEAD_DIM": 128, "HALF": 64, "HALF_DIMS": 64, "REST_DIMS": 0, "HEADS": HEADS}
    signature = pointers | dict.fromkeys(("heads", *strides), "i32")
    yield Configuration("elementwise rotate 128 bf16", _rotate, signature, constants, {"num_warps": 4}, strides)
    sizes = ("width", "gate_stride", "up_stride")
    signature = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16") | dict.fromkeys(sizes, "i32")
    yield Configuration("elementwise silu_mul bf16", _silu_mul, signature, {"COLUMNS": COLUMNS}, {"num_warps": 4}, sizes)
