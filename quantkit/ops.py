"""Which kernel runs what: the one place that looks at the device, the way a weight is stored and the mode.

Three modes. "exact" computes in float32 from the weights as they are stored, and a token's result does not depend on what else is in the batch.
"fast" takes the fastest kernel whose result is as near as 16-bit arithmetic is. "int8" gives up accuracy for speed: activations are rounded to 8
bits, one scale for a run of columns, and multiplied as integers with the codes of integer weights or with the levels of 4-bit floats and tables, or,
where no native kernel takes those, one scale a token, and with weights rounded again to 8 bits a row (`quantkit bench modes` measures what that
costs).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import gcd
from types import ModuleType
from typing import Literal

import torch
from quantkit_kernels import reference
from quantkit_kernels.cpu import int4_linear, int8_activations, int8_linear, invariant_linear, low_bit_linear
from quantkit_kernels.cpu import paged_attention as cpu_attention
from torch import Tensor
from torch.nn import functional

from quantkit.core.activations import fake_quantize, quantize_activations
from quantkit.core.data_free import INT8_ROWS, to_int8_rows
from quantkit.core.levels import table
from quantkit.core.qtensor import LLM_INT8_STEP, QuantizedTensor
from quantkit.core.scheme import CHANNEL, ActivationSpec, Scheme
from quantkit.errors import UsageError

Mode = Literal["fast", "exact", "int8"]
Linear = Callable[[Tensor], Tensor]
"""[M, K] to [M, N]; bias not included."""

store_kv = reference.store_kv
in_tiles = invariant_linear.in_tiles


def dense_linear(weight: Tensor, mode: Mode) -> Linear:
    """A weight [N, K] that is not quantized."""
    if mode == "exact":
        weight = weight.float()
        return lambda x: _invariant(x, weight)
    if weight.device.type == "cpu" and not (weight.dtype == torch.bfloat16 and has_fast_bfloat16()):
        weight = weight.float()
    return lambda x: functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def quantized_linear(q: QuantizedTensor, scheme: Scheme, mode: Mode) -> Linear:
    """A quantized weight, repacked once for the kernel that runs it; on the device that `q` is on."""
    activation = scheme.activation
    if (order := _order_by_group(q, activation)) is not None:
        in_order = quantized_linear(replace(q, codes=q.codes[:, order], group_of_column=None), scheme, mode)
        return lambda x: in_order(x[:, order])
    if activation is None and mode == "int8":
        is_native = why_not_native(q, exact=False) is None
        return _native(q, exact=False) if is_native else _int8_activations(to_int8_rows(q), ActivationSpec())
    if activation == ActivationSpec() and why_not_int8_activations(q) is None:
        return _int8_activations(q, activation)
    if activation is None and mode == "fast" and why_not_int4(q) is None:
        group = q.spec.group_size(q.shape[1])
        packed, scales = int4_linear.pack(q.codes, q.scale, q.spec.mid_code if q.zero is None else q.zero)
        return lambda x: int4_linear.linear(x, packed, scales, group)
    if activation is None and mode == "fast" and why_not_int8(q) is None:
        codes, scale = int8_linear.pack(q.codes, q.scale)
        return lambda x: int8_linear.linear(x, codes, scale, fast_bfloat16=has_fast_bfloat16())
    is_exact = mode == "exact" or low_bit_kernels(q.codes.device) is low_bit_linear
    product = _native(q, exact=is_exact) if why_not_native(q, exact=is_exact) is None else _dequantized(q, mode)
    static = q.input_scale
    return product if activation is None else lambda x: product(fake_quantize(x, activation, static))


def why_not_native(q: QuantizedTensor, *, exact: bool) -> str | None:
    """Why the native kernel of this device for weights in groups does not take the tensor, or None when it does.

    Args:
        exact: multiplied in float32; otherwise on a CPU by activations of 8 bits, on a GPU in the activations' type.
    """
    kernels = low_bit_kernels(q.codes.device)
    if kernels is None:
        return "no kernel for this device"
    if q.group_of_column is not None:
        return "groups that are not runs of columns, and not of equal size"
    if q.zero is not None and not 0 <= int(q.zero.min()) <= int(q.zero.max()) <= (127 if q.spec.bits <= 4 else 255):
        return "a zero point beyond those that kernels hold"
    by_8_bits = not exact and kernels is low_bit_linear
    if q.spec.kind == "e4m3" and (by_8_bits or bool((q.codes & 127 == 127).any())):
        return "8-bit floats by activations of 8 bits, or codes that are no numbers"
    return kernels.why_not(q.shape[1], _run_of_scale(q), q.spec.bits, exact=exact)


@cache
def low_bit_kernels(device: torch.device) -> ModuleType | None:
    """The kernels for weights in groups of a device: C++ for CPUs, Triton for GPUs. QUANTKIT_NATIVE=0 asks for neither."""
    if device.type == "cpu":
        return low_bit_linear
    if device.type != "cuda" or find_spec("triton") is None or os.environ.get("QUANTKIT_NATIVE") == "0":
        return None
    return import_module("quantkit_kernels.gpu.low_bit_linear")


def why_not_int4(q: QuantizedTensor) -> str | None:
    """Why the fast 4-bit kernel of this device does not take the tensor, or None when it does."""
    if q.codes.device.type != "cpu":
        return "no kernel for this device yet"
    if q.spec.kind != "int" or q.spec.bits != 4 or q.group_of_column is not None:
        return "not integers of 4 bits, or groups that are not runs of columns"
    return int4_linear.why_not(*q.shape, q.spec.group_size(q.shape[1]))


def why_not_int8(q: QuantizedTensor) -> str | None:
    """Why the fast kernel of this device for 8-bit weights does not take the tensor, or None when it does."""
    return _why_not_int8_rows(q) or int8_linear.why_not(*q.shape)


def why_not_int8_activations(q: QuantizedTensor) -> str | None:
    """Why the integer kernel of this device does not take the tensor, or None when it does."""
    return _why_not_int8_rows(q) or int8_activations.why_not()


def require_mode(mode: Mode, device: torch.device) -> None:
    """Raises UsageError where this machine has no kernel for the mode."""
    reason = ("it runs on CPUs only" if device.type != "cpu" else int8_activations.why_not()) if mode == "int8" else None
    if reason is not None:
        raise UsageError(f"mode 'int8' cannot be used here: {reason}; use 'fast' or 'exact'")


def why_not_native_attention(device: torch.device, head_dim: int, block_size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> str | None:
    """Why attention of these sizes runs on the reference operators, or None when a native kernel takes it."""
    if device.type != "cpu":
        return "no kernel for this device yet"
    return cpu_attention.why_not(head_dim, block_size, heads, kv_heads, dtype)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `quantkit_kernels.reference.paged_attention`."""
    is_native = why_not_native_attention(q.device, q.shape[2], k.shape[3], q.shape[1], k.shape[1], k.dtype) is None
    attention = cpu_attention.paged_attention if is_native else reference.paged_attention
    found = attention(
        q.float(), k, v, k_scale, v_scale, tables, sequence, position,
        scale=scale, window=window, softcap=softcap, sinks=None if sinks is None else sinks.float().contiguous(),
    )  # fmt: skip
    return found.to(q.dtype)


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported()


def _invariant(x: Tensor, weight: Tensor) -> Tensor:
    return invariant_linear.linear(x.float(), weight) if x.device.type == "cpu" else functional.linear(x.float(), weight)


def _dequantized(q: QuantizedTensor, mode: Mode) -> Linear:
    """What runs every scheme: weights held as they are stored, two of at most 4 bits in a byte, and dequantized a few rows at a time."""
    product = _invariant if mode == "exact" else functional.linear
    codes, scale, group_of_column = reference.pack_nibbles(q.codes) if q.spec.bits <= 4 else q.codes, row_scales(q), q.group_of_column
    zero, levels = _zero(q), table(q.spec.kind)
    levels = None if levels is None else levels.to(codes.device)
    return lambda x: reference.low_bit_linear(x, codes, scale, zero, group_of_column, product, levels)


def row_scales(q: QuantizedTensor) -> Tensor:
    """The scales as [N, G], G equal runs of columns, whatever shares them: plain ones in their own type, others in float32."""
    rows, columns = q.shape
    spec, run = q.spec, _run_of_scale(q)
    if spec.is_flat:
        return q.scales.repeat_interleave(spec.group_size(columns) // run)[: rows * columns // run].view(rows, -1)
    if spec.spans_rows:
        high = rows if spec.group is None else spec.group[0]
        return q.scales.view(-1, columns // run).repeat_interleave(high, dim=0)[:rows]
    if spec.scale == "row maximum":
        return q.scales * LLM_INT8_STEP
    return q.scale if spec.scale == "float" else q.scales


def _run_of_scale(q: QuantizedTensor) -> int:
    """Columns of a row, from the first on, that share a scale; of blocks that run over the ends of rows, what is left of them everywhere."""
    size = q.spec.group_size(q.shape[1])
    return gcd(q.shape[1], size) if q.spec.is_flat else size


def _order_by_group(q: QuantizedTensor, activation: ActivationSpec | None) -> Tensor | None:
    """The order of columns in which groups are runs; None where they are, or where some are larger than others, or inputs have groups as well."""
    if q.group_of_column is None or (activation is not None and activation.group not in (CHANNEL, None)):
        return None
    sizes = q.group_of_column.long().bincount(minlength=q.scale.shape[1])
    return q.group_of_column.argsort(stable=True) if bool((sizes == q.spec.group_size(q.shape[1])).all()) else None


def _zero(q: QuantizedTensor) -> Tensor | int:
    return q.zero if q.zero is not None else q.spec.mid_code if q.spec.kind == "int" else 0


def _native(q: QuantizedTensor, *, exact: bool) -> Linear:
    scale = row_scales(q)
    if scale.dtype == torch.float32 and torch.equal(scale.bfloat16().float(), scale):
        scale = scale.bfloat16()  # as powers of two are
    kernels = low_bit_kernels(q.codes.device)
    assert kernels is not None
    packed = kernels.pack(q.codes, scale, _zero(q), q.spec.bits, table(q.spec.kind))
    return lambda x: kernels.linear(x.contiguous(), packed, exact=exact).to(x.dtype)


def _int8_activations(q: QuantizedTensor, activation: ActivationSpec) -> Linear:
    packed, has_vnni = int8_activations.pack(q.codes, q.scale), torch.cpu._is_vnni_supported()
    return lambda x: int8_activations.linear(*quantize_activations(x, activation), packed, has_vnni=has_vnni).to(x.dtype)


def _why_not_int8_rows(q: QuantizedTensor) -> str | None:
    if q.codes.device.type != "cpu":
        return "no kernel for this device yet"
    if q.spec != INT8_ROWS or q.group_of_column is not None:
        return "not 8 bits on a symmetric grid with one scale a row"
    return None
