"""Which kernel runs what: the one place that looks at the device, the way a weight is stored and the mode.

Two modes. "exact" computes in float32 from the weights as they are stored, and a token's result does not depend on what else is in the batch.
"fast" takes the fastest kernel whose result is as near as 16-bit arithmetic is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from quantkit_kernels import reference
from quantkit_kernels.cpu import int4_linear, invariant_linear
from quantkit_kernels.cpu import paged_attention as cpu_attention
from torch import Tensor
from torch.nn import functional

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import fake_quantize
from quantkit.core.scheme import Scheme

Mode = Literal["fast", "exact"]
Linear = Callable[[Tensor], Tensor]
"""[M, K] to [M, N]; bias not included."""

store_kv = reference.store_kv


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
    zero: Tensor | int = q.spec.mid_code if q.zero is None else q.zero
    product = _invariant if mode == "exact" else functional.linear
    if scheme.activation is not None:
        activation = scheme.activation
        return lambda x: reference.low_bit_linear(fake_quantize(x, activation), q.codes, q.scale, zero, q.group_of_column, product)
    if mode == "fast" and why_not_int4(q) is None:
        group = q.spec.group_size(q.shape[1])
        packed, scales = int4_linear.pack(q.codes, q.scale, zero)
        return lambda x: int4_linear.linear(x, packed, scales, group)
    return lambda x: reference.low_bit_linear(x, q.codes, q.scale, zero, q.group_of_column, product)


def why_not_int4(q: QuantizedTensor) -> str | None:
    """Why the fast 4-bit kernel of this device does not take the tensor, or None when it does."""
    if q.codes.device.type != "cpu":
        return "no kernel for this device yet"
    if q.spec.bits != 4 or q.group_of_column is not None:
        return "codes of other widths, or groups that are not runs of columns"
    return int4_linear.why_not(*q.shape, q.spec.group_size(q.shape[1]))


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `quantkit_kernels.reference.paged_attention`."""
    is_native = q.device.type == "cpu" and cpu_attention.why_not(q.shape[2], k.shape[3], q.shape[1], k.shape[1], k.dtype) is None
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
