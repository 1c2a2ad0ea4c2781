"""Keys and values of new tokens into the blocks of a cache, in Triton: one kernel quantizes and stores both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.ahead_of_time import Configuration
from quantkit_kernels.gpu.paged_attention import Q_TYPES, TYPES

TOKENS = 16
_ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def _e4m3(x):
    """The bytes of E4M3 nearest to float32 values of at most 448, even ones of two; in integers, as not every GPU converts."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - (120 << 3)
    steps = size.to(tl.float32, bitcast=True) + 16384.0  # below 2**-6 values are whole steps of 2**-9, which is what ends this sum
    small = steps.to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < (121 << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def _quantize(x, fixed_ptr, head, AXIS: tl.constexpr, TOP: tl.constexpr, IS_INTEGER: tl.constexpr):
    """Codes, and the scale of each token."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=AXIS), 1e-12)
    if fixed_ptr is None:
        scale = tl.div_rn(largest, tl.full(largest.shape, TOP, dtype=tl.float32))
        scale = tl.where(tl.max((x != x).to(tl.int32), axis=AXIS) > 0, float("nan"), scale)
    else:
        scale = tl.load(fixed_ptr + head) + tl.zeros_like(largest)
    x = tl.clamp(tl.div_rn(x, tl.expand_dims(scale, AXIS) + tl.zeros_like(x)), -TOP, TOP, propagate_nan=tl.PropagateNan.ALL)
    codes = (x + _ROUNDING - _ROUNDING).to(tl.int8) if IS_INTEGER else _e4m3(x)
    return codes, scale


@triton.jit(do_not_specialize=["tokens"])
def _store(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, slots_ptr, k_scale_ptr, v_scale_ptr, fixed_k_ptr, fixed_v_ptr,
    tokens, heads, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIMS: tl.constexpr, TOKENS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    dim = tl.arange(0, DIMS)
    is_token, is_dim = token < tokens, dim < HEAD_DIM
    slot = tl.load(slots_ptr + token, mask=is_token, other=0)
    row, inside, token = slot // BLOCK_SIZE * heads + head, slot % BLOCK_SIZE, token.to(tl.int64)

    is_k = is_dim[:, None] & is_token[None, :]
    k = tl.load(k_ptr + token[None, :] * k_token_stride + head * k_head_stride + dim[:, None], mask=is_k, other=0.0)  # [DIMS, TOKENS]
    is_v = is_token[:, None] & is_dim[None, :]
    v = tl.load(v_ptr + token[:, None] * v_token_stride + head * v_head_stride + dim[None, :], mask=is_v, other=0.0)  # [TOKENS, DIMS]
    if k_scale_ptr is not None:
        k, k_scale = _quantize(k.to(tl.float32), fixed_k_ptr, head, 0, TOP, k_cache_ptr.dtype.element_ty == tl.int8)
        v, v_scale = _quantize(v.to(tl.float32), fixed_v_ptr, head, 1, TOP, k_cache_ptr.dtype.element_ty == tl.int8)
        tl.store(k_scale_ptr + row * BLOCK_SIZE + inside, k_scale, mask=is_token)
        tl.store(v_scale_ptr + row * BLOCK_SIZE + inside, v_scale, mask=is_token)
    at = row * (HEAD_DIM * BLOCK_SIZE)
    tl.store(k_cache_ptr + (at + inside)[None, :] + dim[:, None] * BLOCK_SIZE, k.to(k_cache_ptr.dtype.element_ty), mask=is_k)
    tl.store(v_cache_ptr + (at + inside * HEAD_DIM)[:, None] + dim[None, :], v.to(v_cache_ptr.dtype.element_ty), mask=is_v)


def store_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    fixed_scales: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """As `reference.store_kv`, to the bit, but for what int8 stands for NaN (a scale of its own is NaN then).

    Raises:
        ValueError: tensors of other types, shapes, strides or devices.
    """
    _check(k_cache, v_cache, k, v, slots, k_scale, v_scale, fixed_scales)
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    fixed_k, fixed_v = fixed_scales or (None, None)
    top = 127.0 if k_cache.dtype == torch.int8 else 448.0
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    with torch.cuda.device_of(k):
        _store[(triton.cdiv(tokens, TOKENS), heads)](
            k_cache, v_cache, k, v, slots, k_scale, v_scale, fixed_k, fixed_v, tokens, heads, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[3], DIMS=triton.next_power_of_2(head_dim), TOKENS=TOKENS, TOP=top, num_warps=4,
        )  # fmt: skip


def _check(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    fixed_scales: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    def require(is_right: bool, message: str) -> None:
        if not is_right:
            raise ValueError(f"store_kv: {message}")

    require(k_cache.ndim == v_cache.ndim == 4 and k.ndim == 3, "it takes caches of 4 dimensions, k and v of 3")
    (tokens, heads, head_dim), (blocks, _, _, block_size) = k.shape, k_cache.shape
    named = {"k_scale": k_scale, "v_scale": v_scale}
    require(k_cache.dtype in TYPES, f"a cache of {k_cache.dtype}; it takes {', '.join(str(each).removeprefix('torch.') for each in TYPES)}")
    for name, cache, shape in (
        ("k_cache", k_cache, (blocks, heads, head_dim, block_size)), ("v_cache", v_cache, (blocks, heads, block_size, head_dim)),
    ):  # fmt: skip
        right = cache.dtype == k_cache.dtype and cache.shape == shape and cache.is_contiguous()
        require(right, f"{name} of {cache.dtype} {list(cache.shape)}; with these keys it takes contiguous {k_cache.dtype} {list(shape)}")
    for name, x in (("k", k), ("v", v)):
        require(x.dtype in Q_TYPES and x.shape == k.shape, f"{name} of {x.dtype} {list(x.shape)}; it takes a float type, {list(k.shape)}")
        require(x.stride(2) == 1, f"{name} whose heads are not contiguous; make them so")
    require(slots.dtype == torch.int64 and slots.shape == (tokens,), f"slots of {slots.dtype} {list(slots.shape)}; it takes int64 [{tokens}]")
    for name, scale in named.items():
        require((scale is None) == (k_cache.dtype.itemsize > 1), f"a cache of {k_cache.dtype} {'without' if scale is None else 'with'} {name}")
        right = scale is None or (scale.dtype == torch.float32 and scale.shape == (blocks, heads, block_size) and scale.is_contiguous())
        require(right, f"{name} that is not contiguous float32 {[blocks, heads, block_size]}")
    for fixed in fixed_scales or ():
        right = fixed.dtype == torch.float32 and fixed.shape == (heads,) and fixed.is_contiguous()
        require(right, f"fixed scales that are not contiguous float32 [{heads}]")
    for x in (v_cache, k, v, slots, *named.values(), *(fixed_scales or ())):
        require(x is None or x.device == k_cache.device, "tensors on different devices; put them on one")
    require(slots.is_contiguous(), "slots that are not contiguous; make them so")


def shipped() -> Iterator[Configuration]:
    """Caches of every kind, for keys and values in bfloat16."""
    head_dim = 128
    for stored in ("bf16", "i8", "u8"):
        is_8_bit = stored != "bf16"
        pointers = {"k_cache_ptr": stored, "v_cache_ptr": stored, "k_ptr": "bf16", "v_ptr": "bf16", "slots_ptr": "i64"}
        pointers |= {"k_scale_ptr": "fp32", "v_scale_ptr": "fp32"} if is_8_bit else {}
        strides = ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")
        signature = {name: f"*{of}" for name, of in pointers.items()} | dict.fromkeys(("tokens", "heads", *strides), "i32")
        constants = {name: None for name in _store.arg_names if name.endswith("_ptr") and name not in signature} | {
            "HEAD_DIM": head_dim, "BLOCK_SIZE": 16, "DIMS": head_dim, "TOKENS": TOKENS, "TOP": 127.0 if stored == "i8" else 448.0,
        }  # fmt: skip
        yield Configuration(f"store_kv {head_dim} {stored}", _store, signature, constants, {"num_warps": 4}, strides)
