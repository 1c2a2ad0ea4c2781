"""Paged attention in Triton: runs of query tokens with the heads of one KV head as rows of a tile, keys in splits that a second kernel merges.

A program takes the tokens of one sequence that lie in one aligned block of tokens: the first ones of the block, or, of sequences that start within a
block, those from the start on. So programs need no table beyond the first token of each sequence. Softmax is online, in float32, with exponents of 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.ahead_of_time import ARCHITECTURES, Configuration

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
Q_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES, MIN_HEAD, MAX_HEAD, MAX_GROUP = 16, 16, 256, 128
PROGRAMS_PER_PROCESSOR = 4
"""Splits are made until so many programs stand ready for each multiprocessor."""
SPLIT_KEYS, EXACT_SPLIT_KEYS = 256, 1024
"""The least keys of a split; all of them in exact mode."""
EXACT_SCRATCH_BYTES = 256 << 20
_MERGED = 16
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens times heads) and keys of a tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {
    "decode": {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)},
    "prefill": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    "decode float32": {64: Tile(16, 64, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 3)},
    "prefill float32": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 4, 2)},
    "exact": {64: Tile(16, 32, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 32, 8, 1)},
}
"""By head size; others take those of the next one. Chosen by compiles, not timed yet: all fit every architecture, and none spills on sm_90 with up
to 32 heads to a KV head; on sm_80 and sm_89, prefill may: up to 152 bytes a thread of 8-bit caches, 8 of others."""


@triton.jit
def _numbers(x, TYPE: tl.constexpr):
    """What is stored, in TYPE. Codes of 8 bits are made float16 by their bits: int8, and E4M3 given as bytes, for GPUs that do not convert it."""
    if x.dtype == tl.int8:
        return (((x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0).to(TYPE)
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half).to(TYPE)
    return x.to(TYPE)


@triton.jit(do_not_specialize=["tokens", "table_stride", "num_blocks_of_tokens", "num_splits", "window"])
def _attend(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, sequence_ptr, position_ptr, starts_ptr, sinks_ptr, out_ptr, state_ptr,
    tokens, heads, kv_heads, q_token_stride, q_head_stride, table_stride, num_blocks_of_tokens, num_splits, scale, window, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, HAS_UNIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_SPLIT: tl.constexpr, SPLIT_TILES: tl.constexpr, IS_FIXED: tl.constexpr,
):  # fmt: skip
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block * TOKENS
    if starts_ptr is not None:
        is_start = block >= num_blocks_of_tokens
        start = tl.load(starts_ptr + block - num_blocks_of_tokens, mask=is_start, other=0)
        if is_start & ((start >= tokens) | (start % TOKENS == 0)):
            return
        first = tl.where(is_start, start, first)
    sequence = tl.load(sequence_ptr + first)
    end = tl.minimum((first // TOKENS + 1) * TOKENS, tokens)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = token < end
    is_row &= tl.load(sequence_ptr + token, mask=is_row, other=-1) == sequence
    place = tl.load(position_ptr + token, mask=is_row, other=-1)
    dim = tl.arange(0, DIMS)
    is_dim = dim < HEAD_DIM
    q_at = token.to(tl.int64)[:, None] * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=is_row[:, None] & is_dim[None, :], other=0.0)  # [ROWS, DIMS]
    if HAS_UNIT:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    q = q.to(TYPE)

    high = tl.max(place, axis=0)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(tl.min(tl.where(is_row, place, high), axis=0) - window + 1, 0)
    first_tile, end_tile = low // KEYS, high // KEYS + 1
    if IS_FIXED:
        start = split * SPLIT_TILES
        end_tile = tl.minimum(start + SPLIT_TILES, end_tile)
        first_tile = tl.maximum(start, first_tile)
    elif IS_SPLIT:
        each = tl.maximum(tl.cdiv(end_tile - first_tile, num_splits), SPLIT_TILES)
        first_tile += split * each
        end_tile = tl.minimum(first_tile + each, end_tile)

    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
        largest = tl.where(split == 0, sink, largest)
        total += tl.where(split == 0, 1.0, 0.0)
    found = tl.zeros((ROWS, DIMS), dtype=tl.float32)
    unit = 1e-30
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    for tile in range(first_tile, end_tile):
        key = tile * KEYS + tl.arange(0, KEYS)
        is_block = (key // BLOCK_SIZE >= low // BLOCK_SIZE) & (key // BLOCK_SIZE <= high // BLOCK_SIZE)
        is_key = (key >= low) & (key <= high)
        cache_row = tl.load(table + key // BLOCK_SIZE, mask=is_block, other=0).to(tl.int64) * kv_heads + kv_head
        inside = key % BLOCK_SIZE
        k_at = tl.max_contiguous(tl.multiple_of(cache_row * (HEAD_DIM * BLOCK_SIZE) + inside, RUN), RUN)
        k = tl.load(k_ptr + dim[:, None] * BLOCK_SIZE + k_at[None, :], mask=is_dim[:, None] & is_block[None, :], other=0.0)  # [DIMS, KEYS]
        scores = tl.dot(q, _numbers(k, TYPE), input_precision=PRECISION)  # [ROWS, KEYS]
        if k_scale_ptr is not None:
            scores *= tl.load(k_scale_ptr + cache_row * BLOCK_SIZE + inside, mask=is_key, other=0.0)[None, :]
        scores *= scale
        if HAS_SOFTCAP:
            scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * _LOG2E / softcap)) + 1.0)
        is_seen = is_key[None, :] & (key[None, :] <= place[:, None])
        if HAS_WINDOW:
            is_seen &= key[None, :] > place[:, None] - window
        scores = tl.where(is_seen, scores * _LOG2E, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if v_scale_ptr is not None:
            v_scale = tl.load(v_scale_ptr + cache_row * BLOCK_SIZE + inside, mask=is_key, other=0.0)
            if HAS_UNIT:
                larger_unit = tl.maximum(unit, tl.max(v_scale, axis=0))
                v_scale, shrink, unit = v_scale / larger_unit, shrink * (unit / larger_unit), larger_unit
            weights *= v_scale[None, :]
        v_at = cache_row * (HEAD_DIM * BLOCK_SIZE) + inside * HEAD_DIM
        v = tl.load(v_ptr + v_at[:, None] + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)  # [KEYS, DIMS]
        found = tl.dot(weights.to(TYPE), _numbers(v, TYPE), found * shrink[:, None], input_precision=PRECISION)
        largest = larger

    if HAS_UNIT:
        found *= unit
    at = token.to(tl.int64) * heads + head
    if IS_SPLIT:
        at = at * num_splits + split
        state = state_ptr + 2 * at
        tl.store(state, largest, mask=is_row)
        tl.store(state + 1, total, mask=is_row)
        is_row &= largest > float("-inf")
    else:
        found /= tl.where(is_row, total, 1.0)[:, None]
    tl.store(out_ptr + at[:, None] * HEAD_DIM + dim[None, :], found.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _merge(parts_ptr, state_ptr, out_ptr, num_splits, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIMS)
    is_dim = dim < HEAD_DIM
    largest, total = float("-inf"), 0.0
    found = tl.zeros((DIMS,), dtype=tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = row * num_splits + split
        its_largest = tl.load(state_ptr + 2 * at, mask=split < num_splits, other=float("-inf"))
        its_total = tl.load(state_ptr + 2 * at + 1, mask=split < num_splits, other=0.0)
        is_full = its_largest > float("-inf")
        parts = tl.load(parts_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=is_full[:, None] & is_dim[None, :], other=0.0)  # [SPLITS, DIMS]
        larger = tl.maximum(largest, tl.max(its_largest, axis=0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights, shrink = tl.exp2(its_largest - base), tl.exp2(largest - base)
        total = total * shrink + tl.sum(its_total * weights, axis=0)
        found = found * shrink + tl.sum(parts * weights[:, None], axis=0)
        largest = larger
    tl.store(out_ptr + row * HEAD_DIM + dim, (found / total).to(out_ptr.dtype.element_ty), mask=is_dim)


def why_not(head_dim: int, block_size: int, heads: int, kv_heads: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not take a cache of these sizes, or None when they do."""
    if head_dim % LANES or not MIN_HEAD <= head_dim <= MAX_HEAD:
        return f"heads of {head_dim} values; it takes multiples of {LANES} up to {MAX_HEAD}"
    if block_size % LANES:
        return f"blocks of {block_size} tokens; it takes multiples of {LANES}"
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        return f"{heads} query heads on {kv_heads} KV heads; it takes multiples of them, up to {MAX_GROUP} to a KV head"
    return None if dtype in TYPES else f"a cache of {dtype}; it takes {', '.join(str(each).removeprefix('torch.') for each in TYPES)}"


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, starts: Tensor | None = None, exact: bool = False,
) -> Tensor:  # fmt: skip
    """As `reference.paged_attention`, without waiting for the device.

    Values are multiplied as float16 where the cache has 8 bits, in the type of q and cache where that is one of 16 bits, and as TF32 otherwise.

    Args:
        tables: rows may lie apart. Splits are made for as many keys as a row of it has room for, so a narrower view makes fewer empty ones.
        starts: int32 [R], the first token of each of the R sequences that have any, which lets the launcher tell decoding (R = T) from prefill.
            Without it, it is found on the device, and up to as many tokens as `tables` has rows are taken as decoding: one program a token, so that
            each token of a prefill reads its keys by itself.
        exact: float32 products; a token's result is equal to the bit in any batch.

    Raises:
        ValueError: tensors of other types, shapes, strides or devices.
    """
    _check(q, k, v, k_scale, v_scale, tables, sequence, position, sinks, starts)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, head_dim = q.shape
    at_once = tokens
    is_decode = tokens <= (len(tables) if starts is None else len(starts))
    if exact:
        per_token = 4 * heads * head_dim * triton.cdiv(tables.shape[1] * k.shape[3], EXACT_SPLIT_KEYS)
        at_once = max(1, EXACT_SCRATCH_BYTES // max(1, per_token))
    with torch.cuda.device_of(q):
        for first in range(0, tokens, max(at_once, 1)):
            of = slice(first, first + at_once)
            _launch(
                q[of], k, v, k_scale, v_scale, tables, sequence[of], position[of], sinks, starts if tokens <= at_once else None, out[of],
                scale, window, softcap, is_decode, exact,
            )  # fmt: skip
    return out


def first_tokens(sequence: Tensor, rows: int) -> Tensor:
    """int32 [rows]: the first token of each row of the tables; the number of tokens for rows that have none."""
    numbers = torch.arange(len(sequence), dtype=torch.int32, device=sequence.device)
    return torch.full((rows,), len(sequence), dtype=torch.int32, device=sequence.device).scatter_reduce_(0, sequence.long(), numbers, "amin")


def num_splits(programs: int, processors: int, longest: int) -> int:
    """Into how many parts the keys of every program are split: as many as fill the multiprocessors, none of them shorter than `SPLIT_KEYS`."""
    return max(1, min(triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs), triton.cdiv(longest, SPLIT_KEYS)))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _converts_e4m3(device: torch.device) -> bool:
    """Whether Triton converts E4M3 to every type on the device; elsewhere it is done by bits."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _constants(
    head_dim: int, block_size: int, group: int, q_type: torch.dtype, cache_type: torch.dtype, *, is_decode: bool, exact: bool
) -> tuple[dict[str, object], Tile]:
    """The constants that follow from shapes and types."""
    dims, is_8_bit = triton.next_power_of_2(head_dim), cache_type.itemsize == 1
    dtype = torch.float32 if exact else torch.float16 if is_8_bit else torch.promote_types(q_type, cache_type)
    kind = "exact" if exact else ("decode" if is_decode else "prefill") + (" float32" if dtype == torch.float32 else "")
    tile = TILES[kind][max(64, dims)]
    rows = max(tile.rows, triton.next_power_of_2(group))
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "GROUP": group, "TOKENS": 1 if is_decode else rows // group, "ROWS": rows,
        "KEYS": tile.keys, "DIMS": dims, "RUN": gcd(block_size, tile.keys), "TYPE": _triton(dtype),
        "PRECISION": "ieee" if exact else "tf32", "HAS_UNIT": is_8_bit and not exact, "IS_FIXED": exact,
        "SPLIT_TILES": triton.cdiv(EXACT_SPLIT_KEYS if exact else SPLIT_KEYS, tile.keys),
    }  # fmt: skip
    return constants, tile


def _launch(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    sinks: Tensor | None, starts: Tensor | None, out: Tensor, scale: float, window: int, softcap: float, is_decode: bool, exact: bool,
) -> None:  # fmt: skip
    (tokens, heads, head_dim), (_, kv_heads, _, block_size) = q.shape, k.shape
    constants, tile = _constants(head_dim, block_size, heads // kv_heads, q.dtype, k.dtype, is_decode=is_decode, exact=exact)
    blocks = triton.cdiv(tokens, constants["TOKENS"])
    busy = blocks if is_decode or starts is None else blocks + len(starts)
    if is_decode:
        starts = None
    elif starts is None:
        starts = first_tokens(sequence, len(tables))
    longest = tables.shape[1] * block_size
    if exact:
        splits = triton.cdiv(longest, EXACT_SPLIT_KEYS)
    else:
        splits = num_splits(busy * kv_heads, _processors(q.device), min(longest, window + constants["TOKENS"]) if window else longest)
    is_split = exact or splits > 1
    parts, state = out, None
    if is_split:
        parts = torch.empty(tokens, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        state = torch.empty(tokens, heads, splits, 2, dtype=torch.float32, device=q.device)
    if k.dtype == torch.float8_e4m3fn and not _converts_e4m3(k.device):
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    _attend[(blocks if starts is None else blocks + len(starts), kv_heads, splits)](
        q, k, v, k_scale, v_scale, tables, sequence, position, starts, sinks, parts, state,
        tokens, heads, kv_heads, q.stride(0), q.stride(1), tables.stride(0), blocks, splits, float(scale), window, float(softcap),
        **constants, HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, IS_SPLIT=is_split, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if is_split:
        _merge[(tokens * heads,)](parts, state, out, splits, HEAD_DIM=head_dim, DIMS=constants["DIMS"], SPLITS=_MERGED, num_warps=4)


def _triton(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor, sequence: Tensor, position: Tensor,
    sinks: Tensor | None, starts: Tensor | None,
) -> None:  # fmt: skip
    def require(is_right: bool, message: str) -> None:
        if not is_right:
            raise ValueError(f"paged_attention: {message}")

    require(q.ndim == 3 and k.ndim == v.ndim == 4 and tables.ndim == 2, "it takes q of 3 dimensions, k and v of 4, tables of 2")
    (tokens, heads, head_dim), (blocks, kv_heads, _, block_size) = q.shape, k.shape
    reason = why_not(head_dim, block_size, heads, kv_heads, k.dtype)
    require(reason is None, str(reason))
    require(q.dtype in Q_TYPES, f"q of {q.dtype}; it takes float32, bfloat16, float16")
    require(q.stride(2) == 1, "q whose heads are not contiguous; make them so")
    require(k.shape == (blocks, kv_heads, head_dim, block_size), f"k of {list(k.shape)}; it takes [blocks, kv_heads, {head_dim}, block_size]")
    require(
        v.shape == (blocks, kv_heads, block_size, head_dim) and v.dtype == k.dtype,
        f"v of {v.dtype} {list(v.shape)}; with these keys it takes {k.dtype} {[blocks, kv_heads, block_size, head_dim]}",
    )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require((scale is None) == (k.dtype.itemsize > 1), f"a cache of {k.dtype} {'without' if scale is None else 'with'} {name}")
        if scale is not None:
            right = scale.dtype == torch.float32 and scale.shape == (blocks, kv_heads, block_size)
            require(right, f"{name} of {scale.dtype} {list(scale.shape)}; it takes float32 {[blocks, kv_heads, block_size]}")
    for name, x, shape in (("sequence", sequence, (tokens,)), ("position", position, (tokens,)), ("tables", tables, tables.shape)):
        right = x.dtype == torch.int32 and x.shape == shape
        require(right, f"{name} of {x.dtype} {list(x.shape)}; it takes int32 {list(shape)}")
    require(tables.stride(1) == 1, "tables whose rows are not contiguous; make them so")
    require(starts is None or (starts.dtype == torch.int32 and starts.ndim == 1), "starts that are not int32 of 1 dimension")
    require(sinks is None or (sinks.shape == (heads,) and sinks.dtype in Q_TYPES), f"sinks that are not [{heads}] of a float type")
    for name, x in (("k", k), ("v", v), ("k_scale", k_scale), ("v_scale", v_scale), ("sequence", sequence), ("position", position),
                    ("starts", starts), ("sinks", sinks)):  # fmt: skip
        require(x is None or x.is_contiguous(), f"{name} that is not contiguous; make it so")
    for name, x in (("k", k), ("v", v), ("k_scale", k_scale), ("v_scale", v_scale), ("tables", tables), ("sequence", sequence),
                    ("position", position), ("starts", starts), ("sinks", sinks)):  # fmt: skip
        require(x is None or x.device == q.device, f"{name} and q on different devices; put them on one")


def shipped() -> Iterator[Configuration]:
    """Decoding and prefill of the usual types and head sizes, exact mode, and the merge of splits."""
    bf16, fp32, int8, fp8 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    for head_dim in (64, 128, 256):
        yield _configuration(head_dim, 4, bf16, bf16, is_decode=True)
        yield _configuration(head_dim, 4, bf16, bf16, is_decode=False, options="window softcap sinks" if head_dim == 256 else "")
    yield _configuration(80, 7, bf16, bf16, is_decode=True)
    for is_decode in (True, False):
        yield _configuration(128, 4, fp32, fp32, is_decode=is_decode)
    for head_dim in (128, 256):
        yield _configuration(head_dim, 4, bf16, bf16, is_decode=True, exact=True)
    for cache_type in (int8, fp8):
        for is_decode in (True, False):
            yield _configuration(128, 4, bf16, cache_type, is_decode=is_decode)
    yield _configuration(128, 4, bf16, fp8, is_decode=True, of_bytes=True)
    signature = {"parts_ptr": "*fp32", "state_ptr": "*fp32", "out_ptr": "*bf16", "num_splits": "i32"}
    yield Configuration("paged_attention merge 128", _merge, signature, {"HEAD_DIM": 128, "DIMS": 128, "SPLITS": _MERGED}, {"num_warps": 4})


def _configuration(
    head_dim: int, group: int, q_type: torch.dtype, cache_type: torch.dtype, *, is_decode: bool, exact: bool = False, options: str = "",
    of_bytes: bool = False,
) -> Configuration:  # fmt: skip
    constants, tile = _constants(head_dim, 16, group, q_type, cache_type, is_decode=is_decode, exact=exact)
    is_8_bit, is_split = cache_type.itemsize == 1, is_decode or exact
    stored = "u8" if of_bytes else TYPES[cache_type]
    types = {
        "q_ptr": TYPES[q_type], "k_ptr": stored, "v_ptr": stored, "out_ptr": "fp32" if is_split else TYPES[q_type],
        **dict.fromkeys(("tables_ptr", "sequence_ptr", "position_ptr"), "i32"),
        **(dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "fp32") if is_8_bit else {}),
        **({} if is_decode else {"starts_ptr": "i32"}), **({"sinks_ptr": "fp32"} if "sinks" in options else {}),
        **({"state_ptr": "fp32"} if is_split else {}),
    }  # fmt: skip
    sizes = ("tokens", "heads", "kv_heads", "q_token_stride", "q_head_stride", "table_stride", "num_blocks_of_tokens", "num_splits", "window")
    signature = {name: f"*{of}" for name, of in types.items()} | dict.fromkeys(sizes, "i32") | {"scale": "fp32", "softcap": "fp32"}
    absent = {name: None for name in _attend.arg_names if name.endswith("_ptr") and name not in signature}
    flags = {"HAS_WINDOW": "window" in options, "HAS_SOFTCAP": "softcap" in options, "IS_SPLIT": is_split}
    archs = ARCHITECTURES if cache_type != torch.float8_e4m3fn else tuple(a for a in ARCHITECTURES if (a < 90) == of_bytes)
    return Configuration(
        " ".join(("paged_attention", "exact" if exact else "decode" if is_decode else "prefill", str(head_dim), stored, options)).strip(),
        _attend, signature, constants | flags | absent, {"num_warps": tile.warps, "num_stages": tile.stages},
        ("q_token_stride", "q_head_stride"), archs,
    )  # fmt: skip
