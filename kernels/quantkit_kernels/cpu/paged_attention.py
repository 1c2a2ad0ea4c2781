"""Launcher of the native paged attention: check, allocate, call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quantkit_kernels.cpu.build import library

LANES, MAX_GROUP = 16, 16
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "k", "v", "k_scale", "v_scale", "tables", "sequence", "position", "sinks")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "kv_heads", "head_dim", "block_size", "max_blocks", "window")),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("type", ctypes.c_int32),
    ]  # fmt: skip


def why_not(head_dim: int, block_size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> str | None:
    """Why the native kernel does not take these sizes here, or None when it does."""
    if head_dim % LANES:
        return f"heads of {head_dim} values; it takes multiples of {LANES}"
    if block_size % LANES:
        return f"blocks of {block_size} tokens; it takes multiples of {LANES}"
    if heads // kv_heads > MAX_GROUP:
        return f"{heads // kv_heads} query heads to a KV head; it takes up to {MAX_GROUP}"
    if dtype not in TYPES:
        return f"a cache of {dtype}"
    return None if library("paged_attention") is not None else "no library"


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `reference.paged_attention`.

    Raises:
        MemoryError: there is none for the scores of the longest row.
    """
    native = library("paged_attention")
    assert native is not None
    q = q.contiguous()
    out = torch.empty_like(q)
    assert q.dtype == torch.float32 and k.is_contiguous() and v.is_contiguous() and tables.dtype == sequence.dtype == position.dtype == torch.int32
    pointers = (None if t is None else t.data_ptr() for t in (q, out, k, v, k_scale, v_scale, tables, sequence, position, sinks))
    tokens, heads, head_dim = q.shape
    sizes = (tokens, heads, k.shape[1], head_dim, k.shape[3], tables.shape[1], window)
    call = _Call(*pointers, *sizes, scale, softcap, TYPES[k.dtype])
    if native.paged_attention(ctypes.byref(call)):
        raise MemoryError("no memory for attention scores")
    return out
