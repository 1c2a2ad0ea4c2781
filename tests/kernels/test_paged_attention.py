"""Paged attention: what the reference says, what transformers' attention says, and the same bits whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from quantkit_kernels import reference
from quantkit_kernels.cpu import paged_attention as native
from torch import Tensor

BLOCKS, BLOCK = 40, 16
LENGTHS = (1, 15, 16, 17, 100)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

needs_native = pytest.mark.skipif(native.why_not(64, 16, 4, 2, torch.float32) is not None, reason="no C++ compiler")


class Cache:
    """Sequences of random keys and values in blocks in random order, beside the dense tensors that were stored."""

    def __init__(self, *, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS, block: int = BLOCK) -> None:
        generator = torch.Generator().manual_seed(heads * 1000 + dim)
        self.heads, self.dim, self.lengths = heads, dim, lengths
        scales = torch.full((BLOCKS, kv_heads, block), torch.nan)
        self.k, self.v = (torch.full(s, 1e4).to(dtype) for s in ((BLOCKS, kv_heads, dim, block), (BLOCKS, kv_heads, block, dim)))
        self.k_scale, self.v_scale = (scales.clone(), scales.clone()) if dtype.itemsize == 1 else (None, None)
        free = torch.randperm(BLOCKS, generator=generator).tolist()
        self.tables = torch.zeros(len(lengths), BLOCKS, dtype=torch.int32)
        self.dense: list[tuple[Tensor, Tensor]] = []
        for row, length in enumerate(lengths):
            own = [free.pop() for _ in range(-(-length // block))]
            self.tables[row, : len(own)] = torch.tensor(own)
            slots = torch.tensor([own[i // block] * block + i % block for i in range(length)])
            keys, values = (torch.randn(length, kv_heads, dim, generator=generator) for _ in range(2))
            reference.store_kv(self.k, self.v, keys, values, slots, self.k_scale, self.v_scale)
            self.dense.append((keys, values))
        self.q = torch.randn(sum(lengths), heads, dim, generator=generator)
        self.sequence = torch.cat([torch.full((n,), row) for row, n in enumerate(lengths)]).int()
        self.position = torch.cat([torch.arange(n) for n in lengths]).int()

    def attend(self, attention: object, rows: Tensor | slice = slice(None), **settings: object) -> Tensor:
        cache = (self.k, self.v, self.k_scale, self.v_scale, self.tables)
        return attention(self.q[rows], *cache, self.sequence[rows], self.position[rows], **{"scale": self.dim**-0.5} | settings)


SHAPES = {"grouped": (4, 2, 64), "one-kv-head": (3, 1, 16), "no-groups": (2, 2, 112), "wide": (16, 1, 128)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_scaled_dot_product_attention(shape: str) -> None:
    heads, kv_heads, dim = SHAPES[shape]
    cache = Cache(heads=heads, kv_heads=kv_heads, dim=dim, dtype=torch.float32)

    found = cache.attend(reference.paged_attention).split(LENGTHS)

    for part, query, (keys, values) in zip(found, cache.q.split(LENGTHS), cache.dense, strict=True):
        query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(part, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


OPTIONS = {"plain": {}, "window": {"window": 7}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": torch.tensor([3.0, -1.0, 0.0, 1.0])}}


@needs_native
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_native_attention_means_the_reference(dtype: str, options: str) -> None:
    cache = Cache(heads=4, kv_heads=2, dim=64, dtype=TYPES[dtype])

    torch.testing.assert_close(
        cache.attend(native.paged_attention, **OPTIONS[options]), cache.attend(reference.paged_attention, **OPTIONS[options]), rtol=1e-4, atol=1e-5
    )


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 32])
def test_native_attention_takes_any_heads_and_blocks(shape: str, block: int) -> None:
    heads, kv_heads, dim = SHAPES[shape]
    cache = Cache(heads=heads, kv_heads=kv_heads, dim=dim, dtype=torch.float32, block=block)

    torch.testing.assert_close(cache.attend(native.paged_attention), cache.attend(reference.paged_attention), rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("options", ["plain", "window"])
def test_a_row_is_the_same_bits_in_any_batch(options: str) -> None:
    cache = Cache(heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    whole = cache.attend(native.paged_attention, **OPTIONS[options])

    alone = torch.cat([cache.attend(native.paged_attention, slice(row, row + 1), **OPTIONS[options]) for row in range(len(whole))])

    assert torch.equal(alone, whole)


@needs_native
def test_scores_far_apart_and_a_block_of_garbage_behind_the_end_do_no_harm() -> None:
    cache = Cache(heads=4, kv_heads=2, dim=64, dtype=torch.float32)
    cache.q.mul_(300)
    for table, length in zip(cache.tables, LENGTHS, strict=True):
        if length % BLOCK:
            cache.v[int(table[length // BLOCK]), :, length % BLOCK :] = torch.nan
            cache.k[int(table[length // BLOCK]), :, :, length % BLOCK :] = torch.nan

    found = cache.attend(native.paged_attention)

    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_keys_and_values_are_near_and_their_largest_value_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))

    q, scale = reference.quantize_kv(x, dtype)

    back = q.float() * scale[..., None]
    assert ((back - x).norm() / x.norm()) < (0.01 if dtype == torch.int8 else 0.03)
    torch.testing.assert_close(back.abs().amax(-1), x.abs().amax(-1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((60, 16, 4, 2), "heads of 60"), ((64, 8, 4, 2), "blocks of 8"), ((64, 16, 34, 2), "17 query heads")],
)
def test_what_the_native_kernel_does_not_take_is_said(sizes: tuple[int, int, int, int], message: str) -> None:
    assert message in (native.why_not(*sizes, torch.float32) or "")
