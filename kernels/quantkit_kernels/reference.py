"""What every operator means, in plain torch. Slow, on any device, and what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of OCP's 4-bit floats stand for."""
_WEIGHTS_AT_ONCE = 1 << 20
"""Weights held dequantized: few, so that they stay in the caches."""


def every_e4m3() -> Tensor:
    """float32 [256], what the codes of torch.float8_e4m3fn stand for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def store_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    fixed_scales: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write keys and values of tokens to their slots.

    Args:
        k_cache: [blocks, kv_heads, head_dim, block_size].
        v_cache: [blocks, kv_heads, block_size, head_dim].
        k, v: [T, kv_heads, head_dim].
        slots: int64 [T], block * block_size + place in the block.
        k_scale, v_scale: float32 [blocks, kv_heads, block_size] of an 8-bit cache: one scale a token and head.
        fixed_scales: float32 [kv_heads] of keys and of values, to be taken for every token in place of its own largest magnitude.
    """
    block, at = slots // k_cache.shape[3], slots % k_cache.shape[3]
    fixed_k, fixed_v = fixed_scales or (None, None)
    for cache, scales, fixed, x, is_key in ((k_cache, k_scale, fixed_k, k, True), (v_cache, v_scale, fixed_v, v, False)):
        if scales is not None:
            x, scale = quantize_kv(x, cache.dtype, fixed)
            scales[block, :, at] = scale
        if is_key:
            cache[block, :, :, at] = x.to(cache.dtype)
        else:
            cache[block, :, at] = x.to(cache.dtype)


def quantize_kv(x: Tensor, dtype: torch.dtype, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[T, heads, head_dim] in an 8-bit type with one float32 scale [T, heads] each: the largest magnitude takes the type's largest value.

    With fixed scales [heads], values beyond the type's range take its end.
    """
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / top if fixed is None else fixed.expand(x.shape[:2])
    scaled = x.float() / scale[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-top, top).to(dtype), scale


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of T query tokens of several sequences over keys and values in blocks.

    Args:
        q: [T, heads, head_dim]; query heads are grouped by kv head.
        k, v, k_scale, v_scale: the cache, as `store_kv` fills it.
        tables: int32 [S, max_blocks], the blocks of each sequence in order.
        sequence: int32 [T], the row of `tables` of each token; tokens of a sequence lie together.
        position: int32 [T], the place of each token in its sequence; it sees the keys up to there.
        window: how many keys it sees, its own included; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sinks: [heads], a score without a value in every softmax (gpt-oss), or None.

    Returns:
        [T, heads, head_dim] in q's type; computed in float32.
    """
    out = torch.empty_like(q)
    kv_heads, block_size = k.shape[1], k.shape[3]
    for row in torch.unique(sequence).tolist():
        of = (sequence == row).nonzero()[:, 0]
        last = int(position[of].max())
        blocks = tables[row, : last // block_size + 1].long()
        keys, values = k[blocks].float(), v[blocks].float()
        if k_scale is not None and v_scale is not None:
            keys, values = keys * k_scale[blocks][:, :, None], values * v_scale[blocks][..., None]
        keys = keys.permute(1, 0, 3, 2).reshape(kv_heads, -1, q.shape[2])[:, : last + 1]
        values = values.permute(1, 0, 2, 3).reshape(kv_heads, -1, q.shape[2])[:, : last + 1]
        query = q[of].float().unflatten(1, (kv_heads, -1))  # [t, kv_heads, group, head_dim]
        scores = torch.einsum("tkgd,kcd->tkgc", query, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(last + 1, device=q.device)
        hidden = at[None] > position[of][:, None]
        if window:
            hidden |= at[None] <= position[of][:, None] - window
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : last + 1]
        out[of] = torch.einsum("tkgc,kcd->tkgd", weights, values).flatten(1, 2).to(q.dtype)
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two [T, H], and that divided by its root mean square, times a weight [H]; in x's type, each rounded once, computed in float32."""
    total = x if residual is None else x + residual
    wide = total.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype), total


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, dim], the first R values of each head turned by its token's angles [T, R / 2], one half of them with the other; in float32."""
    first, second, rest = heads.float().split([cos.shape[1], cos.shape[1], heads.shape[2] - 2 * cos.shape[1]], dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(heads.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [T, N], computed in float32 and rounded once."""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def low_bit_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | int, group_of_column: Tensor | None, product: Product, levels: Tensor | None = None
) -> Tensor:
    """[M, K] by a weight of codes, dequantized a few rows at a time: w = (codes - zero) * scale, or levels[codes] * scale.

    Args:
        codes: uint8 [N, K], or two a byte as `pack_nibbles` leaves them.
        scale: [N, G] of any float type.
        zero: [N, G] in the codes' units, or one for all.
        group_of_column: int [K], or None where groups are equal runs of columns.
        product: multiplies [M, K] by [n, K].
        levels: float32 [2**bits], what codes of floats and tables stand for; None for integers.
    """
    columns = x.shape[1]
    at_once = max(1, _WEIGHTS_AT_ONCE // columns)
    parts = []
    for start in range(0, len(codes), at_once):
        of = slice(start, start + at_once)
        z = zero if isinstance(zero, int) else zero[of].float()
        rows = codes[of] if codes.shape[1] == columns else unpack_nibbles(codes[of], columns)
        values = rows.float() if levels is None else levels[rows.long()]
        parts.append(product(x, _dequantize(values, scale[of].float(), z, group_of_column)))
    return torch.cat(parts, dim=1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of at most 4 bits, uint8 [N, K], two a byte: [N, ceil(K / 2)], the even column in the low half."""
    packed = codes[:, ::2].clone()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, columns]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :columns]


def _dequantize(values: Tensor, scale: Tensor, zero: Tensor | int, group_of_column: Tensor | None) -> Tensor:
    rows, columns = values.shape
    groups = scale.shape[1]
    if group_of_column is None and columns % groups == 0:
        z = zero if isinstance(zero, int) else zero[..., None]
        return ((values.view(rows, groups, -1) - z) * scale[..., None]).view(rows, columns)
    z = zero if isinstance(zero, int) else _expand(zero, columns, group_of_column)
    return (values - z) * _expand(scale, columns, group_of_column)


def _expand(per_group: Tensor, columns: int, group_of_column: Tensor | None) -> Tensor:
    if group_of_column is not None:
        return per_group[:, group_of_column.long()]
    return per_group.repeat_interleave(-(-columns // per_group.shape[1]), dim=1)[:, :columns]
