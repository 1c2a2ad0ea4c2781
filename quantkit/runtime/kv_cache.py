"""The tensors of the KV cache: one pair a layer, in blocks, in the type that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.errors import UsageError, did_you_mean

KV_DTYPES = {
    "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


FixedScales = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a token: `heads` keys and values of `dim` values each."""

    heads: int
    dim: int


@dataclass(eq=False, slots=True)
class LayerCache:
    """Keys [blocks, heads, dim, block_size], values [blocks, heads, block_size, dim]; scales [blocks, heads, block_size] where they have 8 bits.

    With fixed scales [heads] of keys and of values, every token's are these.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    fixed_scales: FixedScales | None = None

    def copy_block(self, source: int, target: int) -> None:
        for tensor in (self.k, self.v, self.k_scale, self.v_scale):
            if tensor is not None:
                tensor[target] = tensor[source]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the blocks of one model's cache are made of.

    Attributes:
        fixed_scales: a layer each, where the checkpoint carries scales for its keys and values.
    """

    shapes: tuple[LayerShape, ...]
    block_size: int
    dtype: torch.dtype
    device: torch.device
    fixed_scales: tuple[FixedScales, ...] = field(default=(), compare=False)

    @property
    def bytes_per_block(self) -> int:
        return bytes_per_block(self.shapes, self.block_size, self.dtype)

    def open(self, num_blocks: int) -> KVCache:
        cache = KVCache(self.shapes, num_blocks, self.block_size, self.dtype, self.device)
        for layer, scales in zip(cache.layers, self.fixed_scales, strict=False):
            layer.fixed_scales = scales
        return cache


class KVCache:
    """Every layer's blocks. Block numbers mean the same in all layers."""

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size, self.num_blocks, self.device = block_size, num_blocks, device
        self.layers = [_empty(shape, num_blocks, block_size, dtype, device) for shape in shapes]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for layer in self.layers:
                layer.copy_block(source, target)


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The type of this name; "auto" keeps the model's.

    Raises:
        UsageError: there is no such type.
    """
    if name not in KV_DTYPES:
        raise UsageError(f"unknown KV cache type {name!r}; {did_you_mean(name, KV_DTYPES)}")
    return KV_DTYPES[name] or model_dtype


def bytes_per_block(shapes: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    per_value = dtype.itemsize
    per_head = 4 if per_value == 1 else 0
    return sum(2 * block_size * shape.heads * (shape.dim * per_value + per_head) for shape in shapes)


def _empty(shape: LayerShape, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    k = torch.zeros(blocks, shape.heads, shape.dim, block_size, dtype=dtype, device=device)
    v = torch.zeros(blocks, shape.heads, block_size, shape.dim, dtype=dtype, device=device)
    scales = (torch.zeros(blocks, shape.heads, block_size, device=device) for _ in range(2)) if dtype.itemsize == 1 else (None, None)
    return LayerCache(k, v, *scales)
