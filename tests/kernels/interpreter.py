"""Triton's interpreter, made right where it is wrong: scalars under NumPy 2.4, arithmetic and products of bfloat16, conversions to 8-bit floats.

Triton 3.6 keeps bfloat16 as 16-bit integers and adds those, cuts 8-bit floats without a carry, and cannot take a one-element array as a number
(triton-lang/triton#9171, #11584). Conversions here are torch's, and saturate to 8-bit floats as the hardware's do.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip


def _convert(data: np.ndarray, before: tl.dtype, after: tl.dtype, rounding: object) -> np.ndarray:
    """As `interpreter._convert_float`: the bits of `data`, of type `before`, as bits of type `after`."""
    values = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).copy()).view(_TORCH[before])
    if after in (tl.float8e4nv, tl.float8e5):
        top = torch.finfo(_TORCH[after]).max
        values = values.float().clamp(-top, top)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[_TORCH[after].itemsize]
    unsigned = getattr(np, f"uint{8 * _TORCH[after].itemsize}")
    return values.to(_TORCH[after]).view(bits).numpy().view(unsigned).reshape(data.shape)


def _wide(handle: interpreter.TensorHandle) -> np.ndarray:
    return _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if interpreter._convert_float is _convert:
        return
    interpreter._convert_float = _convert
    binary_op, create_dot, create_fma, unary_op, patch_tensor = (
        builder.binary_op, builder.create_dot, builder.create_fma, builder.unary_op, interpreter._patch_lang_tensor,
    )  # fmt: skip

    def is_narrow(x: interpreter.TensorHandle) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def as_stored(values: np.ndarray) -> interpreter.TensorHandle:
        if values.dtype == bool:
            return handle(values, tl.int1)
        return handle(_convert(values.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)

    def binary(self, lhs, rhs, op):
        return as_stored(op(_wide(lhs), _wide(rhs))) if is_narrow(lhs) and is_narrow(rhs) else binary_op(self, lhs, rhs, op)

    def unary(self, arg, op):
        return as_stored(op(_wide(arg))) if is_narrow(arg) else unary_op(self, arg, op)

    def fma(self, x, y, z):
        return as_stored(_wide(x) * _wide(y) + _wide(z)) if is_narrow(z) else create_fma(self, x, y, z)

    def dot(self, a, b, d, *settings):
        a, b = (handle(_wide(each), tl.float32) if is_narrow(each) else each for each in (a, b))
        return create_dot(self, a, b, d, *settings)

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    builder.get_bf16 = lambda self, value: as_stored(np.array([value], dtype=np.float32))
    builder.binary_op, builder.unary_op, builder.create_fma, builder.create_dot = binary, unary, fma, dot
    interpreter._patch_lang_tensor = patch
