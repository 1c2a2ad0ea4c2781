"""Triton products with weights of up to 8 bits in groups, integers or floats: one kernel; pack once, then check, allocate, launch.

The weight is the left operand, y^T = W x^T, so that Hopper's matrix instructions read it, decoded, from registers, and 16 rows of x fill a tile. Two
codes are decoded at once by the bits of a word, without converting integers: of integers, 2^m + code less 2^m + zero point. Groups of 64 columns and
more scale float32 sums of products with undivided integers or levels; smaller ones scale the weights. Nothing is tuned while it runs: `tuned/` says
which tiles are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.ahead_of_time import Configuration
from quantkit_kernels.reference import E2M1, every_e4m3

BLOCK, HALF_BLOCK = 32, 16
SCALED_SUMS = 64
"""Columns of a group from which on sums are scaled and not weights; also the fewest columns of a tile."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ADDED = 1024
_STEPS_OF_SPLIT = 4
"""The fewest, so that loads are still ahead of products."""
_TUNED = Path(__file__).parent / "tuned"


@triton.jit(do_not_specialize=["num_rows", "steps_of_split"])
def _linear(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, levels_ptr, y_ptr, num_rows, N, K, x_stride, codes_stride, steps_of_split, unit,
    KIND: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[split, m, n] = sum over a run of k of x[m, k] * number(codes[n, k]) * scales[k // GROUP, n]; a run is steps_of_split * BLOCK_K long.

    Args:
        codes_ptr: words of 32 bits as `pack` leaves them, codes_stride of them a row.
        scales_ptr, zeros_ptr: [G, N].
        unit: a power of two that scales were divided by; 1 where a row has one.
        MIDDLE: the code of an integer that means 0; None where zeros_ptr has it.
        GROUP: columns; 0 where a row has one scale.
        EXACT: multiply and add in float32, in an order that K and GROUP alone settle.
        EVEN: whether BLOCK_K divides K.
    """
    PLANES: tl.constexpr = 2 if KIND == "int8" or KIND == "e4m3" else 4  # codes in half a word
    WORDS: tl.constexpr = BLOCK_K // (2 * PLANES)
    SCALES_SUMS: tl.constexpr = GROUP >= BLOCK_K
    RUN: tl.constexpr = 2 * WORDS if GROUP == 0 or SCALES_SUMS else max(8, GROUP // PLANES)  # places of a plane that share a scale
    dtype: tl.constexpr = tl.float32 if EXACT else x_ptr.dtype.element_ty
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    word, place = tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
    column = place // 8 * (8 * PLANES) + place % 8
    part = tl.arange(0, 2 * WORDS // RUN) * (RUN * PLANES)
    has_n, has_m = (n < N)[:, None], (m < num_rows)[None, :]
    codes_at = codes_ptr + n.to(tl.int64)[:, None] * codes_stride + word[None, :]
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride + column[:, None]
    levels = tl.load(levels_ptr + tl.arange(0, 16)).to(dtype) if KIND == "table4" else None
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(split * steps_of_split, min((split + 1) * steps_of_split, tl.cdiv(K, BLOCK_K))):
        has_word = has_n if EVEN else has_n & (step * WORDS + word < codes_stride)[None, :]
        codes = tl.load(codes_at + step * WORDS, mask=has_word, other=0)  # [BLOCK_N, WORDS]
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32) if SCALES_SUMS or EXACT else total
        looked_up = _looked_up(codes, levels) if KIND == "table4" else None
        for plane in tl.static_range(PLANES):
            start = step * BLOCK_K + 8 * plane
            x = tl.load(x_at + start, mask=has_m if EVEN else has_m & (start + column < K)[:, None], other=0.0)  # [2 * WORDS, BLOCK_M]
            if plane == 0 or (GROUP > 0 and GROUP < 8 * PLANES):
                group_at, has_group = n[:, None], has_n
                if GROUP > 0:
                    group_at += ((start + part) // GROUP).to(tl.int64)[None, :] * N
                    has_group &= (start + part < K)[None, :]
                scale = tl.load(scales_ptr + group_at, mask=has_group, other=0.0).to(tl.float32)  # [BLOCK_N, parts]
                zero = _spread(tl.load(zeros_ptr + group_at, mask=has_group, other=0), RUN // 2) if MIDDLE is None else MIDDLE
            w = looked_up[plane] if KIND == "table4" else _numbers(codes >> (16 // PLANES * plane), zero, KIND, MIDDLE, dtype)  # [BLOCK_N, 2 * WORDS]
            if GROUP > 0 and not SCALES_SUMS:
                w *= _spread(scale.to(dtype), RUN)
            sums = tl.dot(w, x.to(dtype), sums, input_precision=precision)
        if SCALES_SUMS:
            total += sums * scale
        elif EXACT:
            total += sums
        else:
            total = sums
    total *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None] if GROUP == 0 else unit
    y_at = y_ptr + (split.to(tl.int64) * num_rows + m[None, :]) * N + n[:, None]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=has_n & has_m)


@triton.jit
def _numbers(words, zero, KIND: tl.constexpr, MIDDLE: tl.constexpr, dtype: tl.constexpr):
    """What the lowest code in each half of a word stands for: of words [N, W], [N, 2 W], the lower half's before the higher's."""
    codes = words & (0x00FF00FF if KIND == "int8" or KIND == "e4m3" else 0x000F000F)
    if KIND == "e2m1":
        return _floats(codes, 2, 1, dtype)
    elif KIND == "e4m3":
        return _floats(codes, 4, 3, dtype)
    else:
        within: tl.constexpr = tl.float16 if KIND == "int8" and dtype == tl.bfloat16 else dtype
        power: tl.constexpr = 8388608.0 if within == tl.float32 else 1024.0 if within == tl.float16 else 128.0
        above = power + MIDDLE if MIDDLE is not None else _integers(zero.to(tl.int32) * 0x00010001, within)
        return (_integers(codes, within) - above).to(dtype)


@triton.jit
def _looked_up(words, levels):
    """As `_numbers`, from a table, for each of the four codes in halves of words: one look-up, since its barriers take time."""
    low = tl.join(_halves(words & 0x000F000F), _halves((words >> 4) & 0x000F000F))
    high = tl.join(_halves((words >> 8) & 0x000F000F), _halves((words >> 12) & 0x000F000F))
    codes = tl.join(low, high)  # [N, 2 W, 2, 2]
    numbers = tl.gather(levels, tl.reshape(codes.to(tl.int32), (8 * words.shape[0] * words.shape[1],)), 0)
    low, high = tl.split(tl.reshape(numbers, codes.shape))
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
def _integers(codes, dtype: tl.constexpr):
    """A power of two and the code of each half, by bits; exact to 127 in bfloat16, to 1023 in float16."""
    if dtype == tl.float32:
        return (_halves(codes).to(tl.uint32) | 0x4B000000).to(dtype, bitcast=True)
    else:
        return _halves(codes | (0x64006400 if dtype == tl.float16 else 0x43004300)).to(dtype, bitcast=True)


@triton.jit
def _floats(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, dtype: tl.constexpr):
    """Floats of a sign, EXPONENT and MANTISSA bits: moved to their places in the wider type, then times the difference of biases. Exact."""
    SIGN: tl.constexpr = EXPONENT + MANTISSA
    up: tl.constexpr = (23 if dtype == tl.float32 else 10 if dtype == tl.float16 else 7) - MANTISSA
    top: tl.constexpr = (31 if dtype == tl.float32 else 15) - SIGN
    ones: tl.constexpr = 1 if dtype == tl.float32 else 0x00010001
    codes = _halves(codes).to(tl.uint32) if dtype == tl.float32 else codes
    bits = ((codes & (ones * ((1 << SIGN) - 1))) << up) | ((codes & (ones << SIGN)) << top)
    bits = bits if dtype == tl.float32 else _halves(bits)
    return bits.to(dtype, bitcast=True) * 2.0 ** ((15 if dtype == tl.float16 else 127) - (1 << (EXPONENT - 1)) + 1)


@triton.jit
def _halves(words):
    """[N, W] of 32 bits as [N, 2 W] of 16, the lower half before the higher."""
    both = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))  # [N, W, 2]
    return tl.reshape(both, (words.shape[0], 2 * words.shape[1]))


@triton.jit
def _spread(values, RUN: tl.constexpr):
    """[N, P] as [N, P * RUN], RUN times each."""
    runs = tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], RUN))
    return tl.reshape(runs, (values.shape[0], values.shape[1] * RUN))


@triton.jit(do_not_specialize=["num_parts"])
def _add(parts_ptr, y_ptr, size, num_parts, BLOCK_SIZE: tl.constexpr):
    """y[i] = sum of parts[part, i], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_ptr + part * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns] as the kernel reads it.

    Attributes:
        codes: int32 [rows, columns / 8], or / 4 of 8 bits. Word w of the four of 32 columns has columns 2 w + 8 i in its lower half, from the lowest
            bits on, and the ones behind them in its higher half; likewise of 16 columns of 8 bits.
        scales, zeros: [groups, rows]; zeros uint8, of integers with zero points.
        group: columns that share a scale; all, or 16, or 32, or a multiple of 64.
        middle: the code of an integer without zero points that means 0.
        levels: float32 [16], what codes that a table is for stand for.
        unit: a power of two that scales were divided by, so that those of small groups are in float16 what they are.
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
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut: rows of the weight, rows of x and columns of a tile, and the programs up to which few tiles are split along K."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    programs: int = 0


def why_not(columns: int, group: int, bits: int, *, exact: bool = True) -> str | None:
    """Why the kernel does not take a weight of these sizes here, or None when it does; either way of `linear` takes the same."""
    if columns % max(group, BLOCK) or (group % BLOCK and not (group == HALF_BLOCK and bits <= 4)):
        return f"{columns} columns in groups of {group}; it takes whole groups of multiples of {BLOCK}, of 4 bits of {HALF_BLOCK} too"
    if not 1 <= bits <= 8:
        return f"codes of {bits} bits; it takes up to 8"
    if not _is_interpreted() and not (torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() >= (8, 0)):
        return "no NVIDIA GPU of compute capability 8.0 or higher"
    return None


def pack(codes: Tensor, scale: Tensor, zero: Tensor | int, bits: int, levels: Tensor | None = None) -> Packed:
    """Codes uint8 [N, K] and their scales as the kernel reads them, on the device where they are.

    Args:
        scale: [N, G] in a floating-point type.
        zero: of integers, the codes that mean nothing, [N, G] or one for all; to 127 for codes of up to 4 bits, to 255 for others.
        levels: what the codes of 4-bit floats or tables stand for, [16]; or the 256 values of torch.float8_e4m3fn. None for integers.

    Raises:
        ValueError: other levels or zero points, or codes of torch.float8_e4m3fn that are no numbers.
    """
    (rows, columns), stored = codes.shape, 4 if bits <= 4 else 8
    kind = f"int{stored}" if levels is None else _kind_of(levels)
    if kind == "e4m3" and bool((codes & 127 == 127).any()):
        raise ValueError("low_bit_linear: codes of torch.float8_e4m3fn that are no numbers; it takes finite ones")
    highest = 127 if stored == 4 else 255
    ends = (zero, zero) if isinstance(zero, int) else (int(zero.min()), int(zero.max()))
    if levels is None and not 0 <= ends[0] <= ends[1] <= highest:
        raise ValueError(f"low_bit_linear: zero points from {ends[0]} to {ends[1]}; of {bits} bits it takes 0 to {highest}")
    if stored == 4:
        pairs = codes.reshape(rows, -1, 2, 2, 8)  # [N, block, byte of a half, nibble, column]
        codes = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    words = codes.reshape(rows, -1, 2, 4, 2).permute(0, 1, 3, 4, 2).contiguous().view(rows, -1).view(torch.int32)
    scale = scale if scale.dtype in TYPES else scale.float()
    group = columns // scale.shape[1]
    times = 1 if group in (columns, HALF_BLOCK) or group % SCALED_SUMS == 0 else group // BLOCK
    has_zeros = levels is None and isinstance(zero, Tensor)
    middle = zero if levels is None and isinstance(zero, int) else 0
    zeros = _by_group(zero.to(torch.uint8), times) if has_zeros else None  # type: ignore[union-attr]
    table = levels.float().contiguous().to(codes.device) if kind == "table4" else None  # type: ignore[union-attr]
    unit = _unit(scale) if group < columns and group // times < SCALED_SUMS else 1.0
    scale = (scale.float() / unit).to(torch.float32 if scale.dtype == torch.float16 and unit > 1 else scale.dtype)
    return Packed(words, _by_group(scale, times), zeros, rows, columns, group // times, kind, middle, table, unit)


def linear(x: Tensor, weight: Packed, *, exact: bool) -> Tensor:
    """[M, K] by the packed weight, [M, N] in x's type, added up in float32.

    Args:
        exact: multiply in float32; a row's result is then the same to the bit whatever other rows there are. Otherwise levels, and scaled weights of
            groups below 64, are rounded to x's type, and float32 x to TF32.

    Raises:
        ValueError: x is not what the kernel reads.
    """
    _check(x, weight)
    (num_rows, columns), rows = x.shape, weight.rows
    y = torch.empty(num_rows, rows, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tiles = tiles_for(num_rows, weight, x.dtype, exact=exact)
    tiles_m, tiles_n, steps = triton.cdiv(num_rows, tiles.block_m), triton.cdiv(rows, tiles.block_n), triton.cdiv(columns, tiles.block_k)
    steps_of_split = triton.cdiv(steps, max(1, min(tiles.programs // (tiles_m * tiles_n), steps // _STEPS_OF_SPLIT)))
    splits = triton.cdiv(steps, steps_of_split)
    to = y if splits == 1 else torch.empty(splits, num_rows, rows, dtype=torch.float32, device=x.device)
    middle, unused = weight.middle if weight.zeros is None else None, weight.scales
    with torch.cuda.device_of(x):
        _linear[(tiles_m, tiles_n, splits)](
            x, weight.codes, weight.scales, unused if weight.zeros is None else weight.zeros, unused if weight.levels is None else weight.levels, to,
            num_rows, rows, columns, x.stride(0) if num_rows > 1 else columns, weight.codes.shape[1], steps_of_split, weight.unit,
            **_constants(weight.kind, middle, _group(weight), exact, tiles, columns % tiles.block_k == 0),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            _add[(triton.cdiv(y.numel(), _ADDED),)](to, y, y.numel(), splits, BLOCK_SIZE=_ADDED)
    return y


def tiles_for(num_rows: int, weight: Packed, dtype: torch.dtype, *, exact: bool) -> Tiles:
    """The tiles of the first rule, of this GPU or else of all, that holds for the product; columns of a tile are made to fit groups."""
    device = weight.codes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
    facts = {"exact": exact, "n": weight.rows, "k": weight.columns, "group": weight.group, "kind": weight.kind}
    holding = (rule for rule in _rules(name) if all(rule.get(key, fact) == fact for key, fact in facts.items()))
    rule = next(rule for rule in holding if num_rows <= rule.get("rows", num_rows))
    return _fitted(Tiles(**rule["tiles"]), _group(weight), dtype, exact)


def shipped() -> Iterator[Configuration]:
    """The default tiles for a weight of 4-bit integers in groups of 128, and each other kind of weight with tiles for few rows.

    What else `linear` launches differs in constants: other groups, a middle, K that a tile does not divide.
    """
    weights = [
        ("int4", 128, None), ("int4", 32, 8), ("int8", 0, 128), ("int8", 64, None), ("e4m3", 0, 0), ("e4m3", 32, 0),
        ("e2m1", 32, 0), ("e2m1", 16, 0), ("table4", 64, 0),
    ]  # fmt: skip
    rules = [(rule["exact"], Tiles(**rule["tiles"])) for rule in _rules("default")]
    for exact, tiles in rules:
        yield _configuration("int4", 8, 128, torch.bfloat16, exact, tiles)
    few_rows = next(tiles for exact, tiles in rules if not exact)
    yield _configuration("int4", 8, 128, torch.float16, False, few_rows)
    for kind, group, middle in weights:
        yield _configuration(kind, middle, group, torch.bfloat16, False, few_rows)
    signature = {"parts_ptr": "*fp32", "y_ptr": "*bf16", "size": "i32", "num_parts": "i32"}
    yield Configuration("low_bit_linear add", _add, signature, {"BLOCK_SIZE": _ADDED}, {"num_warps": 4})


def _configuration(kind: str, middle: int | None, group: int, dtype: torch.dtype, exact: bool, tiles: Tiles) -> Configuration:
    tiles = _fitted(tiles, group, dtype, exact)
    pointers = {"x_ptr": TYPES[dtype], "codes_ptr": "i32", "scales_ptr": "bf16", "zeros_ptr": "u8", "levels_ptr": "fp32", "y_ptr": TYPES[dtype]}
    integers = dict.fromkeys(("num_rows", "N", "K", "x_stride", "codes_stride", "steps_of_split"), "i32")
    name = f"low_bit_linear {kind}{' zeros' if middle is None else ''} g{group or 'K'} {TYPES[dtype]}{' exact' if exact else ''}"
    return Configuration(
        f"{name} {tiles.block_n}x{tiles.block_m}x{tiles.block_k}", _linear,
        {name: f"*{of}" for name, of in pointers.items()} | integers | {"unit": "fp32"},
        _constants(kind, middle, group, exact, tiles, True), {"num_warps": tiles.warps, "num_stages": tiles.stages},
        ("N", "K", "x_stride", "codes_stride"),
    )  # fmt: skip


def _constants(kind: str, middle: int | None, group: int, exact: bool, tiles: Tiles, even: bool) -> dict[str, Any]:
    return {
        "KIND": kind, "MIDDLE": middle, "GROUP": group, "EXACT": exact, "EVEN": even,
        "BLOCK_N": tiles.block_n, "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k,
    }  # fmt: skip


def _fitted(tiles: Tiles, group: int, dtype: torch.dtype, exact: bool) -> Tiles:
    """With columns that lie in one group of 64 or more; small where float32 takes twice the memory, and always the same where sums have an order."""
    is_wide = dtype == torch.float32
    most = SCALED_SUMS if exact or is_wide else tiles.block_k
    block_k = math.gcd(most, group) if group >= SCALED_SUMS else most
    block_m = min(tiles.block_m, 64) if is_wide else tiles.block_m
    return replace(tiles, block_m=block_m, block_k=block_k, programs=0 if exact else tiles.programs)


@cache
def _rules(name: str) -> list[dict[str, Any]]:
    """`tuned/<name of the GPU>.json`, where there is one, before `tuned/default.json`.

    A rule has tiles, says whether they are for `exact`, and may name the one n, k, group or kind, and the most rows of x, that it is for: not where
    exact, since a row would then be added up in other ways in other batches.
    """
    own = _TUNED / f"{name.lower().replace(' ', '_')}.json"
    paths = dict.fromkeys(path for path in (own, _TUNED / "default.json") if path.exists())
    rules = [rule for path in paths for rule in json.loads(path.read_text(encoding="utf-8"))]
    assert all("rows" not in rule for rule in rules if rule["exact"])
    return rules


def _group(weight: Packed) -> int:
    return weight.group if len(weight.scales) > 1 else 0


def _check(x: Tensor, weight: Packed) -> None:
    device = weight.codes.device
    if x.dim() != 2 or x.shape[1] != weight.columns or x.dtype not in TYPES or x.device != device:
        types = "float32, bfloat16 or float16"
        raise ValueError(f"low_bit_linear takes [M, {weight.columns}] in {types} on {device}, not {list(x.shape)} in {x.dtype} on {x.device}")
    if device.type != "cuda" and not _is_interpreted():
        raise ValueError(f"low_bit_linear takes tensors on a GPU, not on {device}; move the codes before they are packed")
    if x.numel() and (x.stride(1) != 1 or (len(x) > 1 and (x.stride(0) < weight.columns or x.stride(0) % 16)) or x.data_ptr() % 16):
        raise ValueError(
            f"low_bit_linear takes rows of contiguous columns that begin on multiples of 16 elements and bytes, not strides {x.stride()} "
            f"{x.data_ptr() % 16} bytes behind such a one; call x.contiguous(), or x.clone() where that is no copy"
        )


def _kind_of(levels: Tensor) -> str:
    if len(levels) == 256 and torch.equal(levels.cpu().nan_to_num(), every_e4m3().nan_to_num()):
        return "e4m3"
    if len(levels) != 16:
        raise ValueError(f"levels are {len(levels)}; the kernel takes 16, or the 256 of torch.float8_e4m3fn")
    return "e2m1" if torch.equal(levels.cpu(), torch.tensor(E2M1)) else "table4"


def _unit(scale: Tensor) -> float:
    """The power of two above the largest."""
    largest = float(scale.float().abs().amax())
    return 2.0 ** math.frexp(largest)[1] if math.isfinite(largest) else 1.0


def _by_group(values: Tensor, times: int) -> Tensor:
    """[N, G] as [G * times, N]."""
    return values.repeat_interleave(times, dim=1).T.contiguous()


def _is_interpreted() -> bool:
    return triton.knobs.runtime.interpret
