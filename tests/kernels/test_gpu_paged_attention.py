"""Triton's paged attention and the storing of keys and values: what the reference says, whatever lies around the cache, in any batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import numpy as np
from quantkit_kernels import reference
from quantkit_kernels.gpu import paged_attention as module
from quantkit_kernels.gpu.ahead_of_time import SHARED_BYTES
from quantkit_kernels.gpu.paged_attention import paged_attention
from quantkit_kernels.gpu.store_kv import store_kv
from triton.runtime import interpreter

LENGTHS = (1, 15, 33, 70)
NOWHERE = 1 << 30
"""A block number that no cache has."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
NEAR = {torch.float32: {"rtol": 2e-3, "atol": 2e-3}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}, torch.float16: {"rtol": 4e-3, "atol": 4e-3}}
EXACT = {"rtol": 1e-4, "atol": 1e-5}
OPTIONS = {
    "plain": {}, "window": {"window": 20}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 2.0, "sinks": True},
}  # fmt: skip


class Cache:
    """Sequences in blocks in random order; blocks and places that none of them has are NaN, and tables end in numbers of no block."""

    def __init__(
        self, device: torch.device, *, heads: int = 4, kv_heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.bfloat16,
        q_dtype: torch.dtype = torch.bfloat16, block: int = 16, lengths: tuple[int, ...] = LENGTHS,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(heads * 1000 + dim)
        used = sum(-(-length // block) for length in lengths)
        self.dim, self.block, self.lengths, self.dtype = dim, block, lengths, dtype
        k, v = torch.zeros(used + 3, kv_heads, dim, block).to(dtype), torch.zeros(used + 3, kv_heads, block, dim).to(dtype)
        if dtype.itemsize == 1:
            k.view(torch.uint8).fill_(0x7F)
            v.view(torch.uint8).fill_(0x7F)
            scales = [torch.full((used + 3, kv_heads, block), torch.nan) for _ in range(2)]
        else:
            k.fill_(torch.nan)
            v.fill_(torch.nan)
            scales = [None, None]
        free = torch.randperm(used + 3, generator=generator).tolist()
        tables = torch.full((len(lengths) + 2, 24), NOWHERE, dtype=torch.int32)
        for row, length in enumerate(lengths):
            own = [free.pop() for _ in range(-(-length // block))]
            tables[row, : len(own)] = torch.tensor(own)
            slots = torch.tensor([own[i // block] * block + i % block for i in range(length)], dtype=torch.int64)
            keys, values = (torch.randn(length, kv_heads, dim, generator=generator) for _ in range(2))
            reference.store_kv(k, v, keys, values, slots, *scales)
        self.k, self.v, self.tables = k.to(device), v.to(device), tables.to(device)
        self.k_scale, self.v_scale = (None if scale is None else scale.to(device) for scale in scales)
        self.q = torch.randn(sum(lengths), heads, dim, generator=generator).to(q_dtype).to(device)
        self.sequence = torch.cat([torch.full((n,), row) for row, n in enumerate(lengths)]).int().to(device)
        self.position = torch.cat([torch.arange(n) for n in lengths]).int().to(device)
        self.sinks = torch.linspace(-1, 3, heads, device=device)

    def attend(self, attention: Callable[..., Tensor], rows: Tensor | slice = slice(None), **settings: object) -> Tensor:
        if settings.get("sinks"):
            settings["sinks"] = self.sinks
        cache = (self.k, self.v, self.k_scale, self.v_scale, self.tables)
        return attention(self.q[rows], *cache, self.sequence[rows], self.position[rows], **{"scale": self.dim**-0.5} | settings)

    @property
    def last(self) -> Tensor:
        """The last token of each sequence."""
        return torch.tensor(self.lengths, device=self.q.device).cumsum(0) - 1

    @property
    def mixed(self) -> Tensor:
        """Two sequences that decode, and the last tokens of two that are prefilled, in an order of their own."""
        ends = self.last.tolist()
        rows = [*range(ends[3] - 20, ends[3] + 1), ends[0], *range(ends[2] - 4, ends[2] + 1), ends[1]]
        return torch.tensor(rows, device=self.q.device)


def in_float64(cache: Cache, rows: Tensor, *, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> Tensor:
    """Attention token by token and head by head, as a textbook has it."""
    heads, (_, kv_heads, _, block) = cache.q.shape[1], cache.k.shape
    out = []
    for row in rows.tolist():
        end = int(cache.position[row]) + 1
        places = range(max(0, end - window) if window else 0, end)
        blocks = [int(cache.tables[int(cache.sequence[row]), place // block]) for place in places]
        inside = [place % block for place in places]
        keys, values = cache.k.double()[blocks, :, :, inside], cache.v.double()[blocks, :, inside]
        if cache.k_scale is not None and cache.v_scale is not None:
            keys = keys * cache.k_scale[blocks, :, inside][..., None]
            values = values * cache.v_scale[blocks, :, inside][..., None]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = keys[:, kv_head] @ cache.q[row, head].double() * cache.dim**-0.5
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if sinks:
                scores = torch.cat([scores, cache.sinks[head : head + 1].double()])
            out.append(torch.softmax(scores, 0)[: len(values)] @ values[:, kv_head])
    return torch.stack(out).view(len(rows), heads, cache.dim)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_prefill_means_the_reference(dtype: str, options: str, device: torch.device) -> None:
    q_dtype = torch.bfloat16 if TYPES[dtype].itemsize == 1 else TYPES[dtype]
    cache = Cache(device, dtype=TYPES[dtype], q_dtype=q_dtype)

    found = cache.attend(paged_attention, **OPTIONS[options])

    torch.testing.assert_close(found, cache.attend(reference.paged_attention, **OPTIONS[options]), **NEAR[q_dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_decoding_means_the_reference(dtype: str, options: str, device: torch.device) -> None:
    cache = Cache(device, dtype=TYPES[dtype])

    found = cache.attend(paged_attention, cache.last, **OPTIONS[options])

    torch.testing.assert_close(found, cache.attend(reference.paged_attention, cache.last, **OPTIONS[options]), **NEAR[torch.bfloat16])


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_decoding_and_prefill_in_one_call_are_what_float64_says(dtype: str, exact: bool, device: torch.device) -> None:
    cache = Cache(device, dtype=TYPES[dtype], q_dtype=torch.float32)

    found = cache.attend(paged_attention, cache.mixed, exact=exact, **OPTIONS["all"])

    near = EXACT if exact else NEAR[torch.float32]
    torch.testing.assert_close(found.double(), in_float64(cache, cache.mixed, **OPTIONS["all"]), **near)


SHAPES = {
    "no-groups-64": (2, 2, 64, 32), "7-to-one-80": (7, 1, 80, 16), "16-wide": (4, 1, 16, 48), "14-on-2-128": (14, 2, 128, 16),
    "20-to-one-64": (20, 1, 64, 16), "192": (4, 2, 192, 32), "256": (2, 1, 256, 16),
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_heads_and_blocks(shape: str, exact: bool, device: torch.device) -> None:
    heads, kv_heads, dim, block = SHAPES[shape]
    cache = Cache(device, heads=heads, kv_heads=kv_heads, dim=dim, block=block, lengths=(1, 5, 18, 41))

    for rows in (cache.mixed, cache.last):
        found = cache.attend(paged_attention, rows, exact=exact)

        torch.testing.assert_close(found, cache.attend(reference.paged_attention, rows), **NEAR[torch.bfloat16])


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLIT_KEYS", 16)
    monkeypatch.setattr(module, "EXACT_SPLIT_KEYS", 32)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("options", OPTIONS)
def test_keys_in_splits_of_which_some_are_empty_mean_the_reference(options: str, exact: bool, device: torch.device) -> None:
    cache = Cache(device, dim=128, kv_heads=1, dtype=torch.int8, lengths=(1, 15, 33, 150))

    found = cache.attend(paged_attention, cache.last, exact=exact, **OPTIONS[options])

    torch.testing.assert_close(found, cache.attend(reference.paged_attention, cache.last, **OPTIONS[options]), **NEAR[torch.bfloat16])


@pytest.fixture
def even_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are BLAS's, whose rows depend on where they stand; those of a GPU in float32 do not, nor do einsum's."""

    def dot(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, d: interpreter.TensorHandle, *_: object) -> object:
        return interpreter.TensorHandle(np.einsum("mk,kn->mn", a.data, b.data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("small_splits", "even_products")
@pytest.mark.parametrize(("dtype", "options"), [("bfloat16", "plain"), ("float32", "all"), ("fp8", "all")])
def test_in_exact_mode_a_token_is_the_same_bits_in_any_batch(
    dtype: str, options: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(device, kv_heads=1, dtype=TYPES[dtype], q_dtype=torch.float32, lengths=(1, 7, 20, 70))
    settings = OPTIONS[options] | {"exact": True}
    mixed = cache.attend(paged_attention, cache.mixed, **settings)

    decoded = cache.attend(paged_attention, cache.last, **settings)
    monkeypatch.setattr(module, "EXACT_SCRATCH_BYTES", 300_000)
    in_parts = cache.attend(paged_attention, cache.mixed, **settings)
    cache.tables = cache.tables[:, :5]
    alone = torch.cat([cache.attend(paged_attention, cache.mixed[row : row + 1], **settings) for row in (3, 20, 21, 23)])

    places = [cache.mixed.tolist().index(row) for row in cache.last.tolist()]
    assert torch.equal(decoded, mixed[places])
    assert torch.equal(in_parts, mixed)
    assert torch.equal(alone, mixed[[3, 20, 21, 23]])


def test_the_first_tokens_may_be_given_and_tell_decoding_from_prefill(device: torch.device) -> None:
    cache = Cache(device, lengths=(3, 2))
    starts = torch.tensor([0, 3], dtype=torch.int32, device=device)

    assert module.first_tokens(cache.sequence, 4).tolist() == [0, 3, 5, 5]
    expected = cache.attend(reference.paged_attention)
    for rows, given in ((slice(None), starts), (slice(None), None), (slice(0, 3), None), (slice(0, 3), starts[:1])):
        found = cache.attend(paged_attention, rows, starts=given)
        torch.testing.assert_close(found, expected[rows], **NEAR[torch.bfloat16])


def test_blocks_before_the_window_are_not_looked_at(device: torch.device) -> None:
    cache = Cache(device, dtype=torch.int8)
    expected = cache.attend(reference.paged_attention, cache.last, window=20)
    cache.tables[3, :3] = NOWHERE
    cache.k_scale[cache.tables[3, 3], :, :2] = torch.nan
    cache.v_scale[cache.tables[3, 3], :, :2] = torch.nan

    torch.testing.assert_close(cache.attend(paged_attention, cache.last, window=20), expected, **NEAR[torch.bfloat16])


def test_scores_far_apart_and_tiny_or_huge_scales_do_no_harm(device: torch.device) -> None:
    cache = Cache(device, dtype=torch.int8)
    cache.q.mul_(100)
    cache.v_scale.mul_(1e-9)

    found = cache.attend(paged_attention, cache.mixed)

    expected = cache.attend(reference.paged_attention, cache.mixed)
    torch.testing.assert_close(found.float() * 1e9, expected.float() * 1e9, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_no_tokens_are_no_work(exact: bool, device: torch.device) -> None:
    cache = Cache(device)

    assert cache.attend(paged_attention, slice(0, 0), exact=exact).shape == (0, 4, 64)


def test_e4m3_given_as_bytes_is_what_the_type_says(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(device, dtype=torch.float8_e4m3fn)
    expected = cache.attend(paged_attention, cache.last)
    monkeypatch.setattr(module, "_converts_e4m3", lambda device: False)

    torch.testing.assert_close(cache.attend(paged_attention, cache.last), expected)


def test_at_no_batch_size_do_splits_leave_multiprocessors_without_programs() -> None:
    programs = [sequences * 8 for sequences in range(1, 300)]
    splits = [module.num_splits(number, 132, 1 << 15) for number in programs]

    assert all(132 * 4 <= number * parts < 132 * 4 + number or parts == 1 for number, parts in zip(programs, splits, strict=True))
    assert splits == sorted(splits, reverse=True)
    assert module.num_splits(1, 132, 100) == 1
    assert module.num_splits(8, 132, 4096) == 16
    assert module.num_splits(8, 132, 1 << 17) == 66
    assert module.num_splits(10_000, 132, 1 << 17) == 1


@pytest.mark.parametrize("fixed", [False, True], ids=["own-scales", "fixed-scales"])
@pytest.mark.parametrize("dtype", TYPES)
def test_stored_keys_and_values_are_the_reference_to_the_bit(dtype: str, fixed: bool, device: torch.device) -> None:
    blocks, heads, dim, block, tokens = 6, 3, 80, 16, 37
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(tokens, 2 * heads, dim, generator=generator).mul(3).bfloat16().to(device)[:, :heads] for _ in range(2))
    k[0], k[1], k[2, :, 0], k[3], v[4] = k[0] * 1e-3, 0.0, 1e4, torch.linspace(-448, 448, dim), torch.linspace(-1e-2, 1e-2, dim)
    slots = torch.randperm(blocks * block, generator=generator)[:tokens].to(device)
    has_scales = TYPES[dtype].itemsize == 1
    scales = tuple(torch.tensor([1.0, 0.01, 2.0**-9], device=device) for _ in range(2)) if fixed and has_scales else None

    def stored(store: Callable[..., None]) -> list[Tensor]:
        shapes = ((blocks, heads, dim, block), (blocks, heads, block, dim))
        cache = [torch.full(shape, 7.0, device=device).to(TYPES[dtype]) for shape in shapes]
        own = [torch.full((blocks, heads, block), 7.0, device=device) for _ in range(2)] if has_scales else [None, None]
        store(*cache, k, v, slots, *own, scales)
        return [*cache, *(each for each in own if each is not None)]

    for found, expected in zip(stored(store_kv), stored(reference.store_kv), strict=True):
        assert torch.equal(found.float(), expected.float())


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_values_that_are_no_numbers_stay_none(dtype: torch.dtype, device: torch.device) -> None:
    k = torch.ones(2, 1, 16, device=device)
    k[1, 0, 3] = torch.nan
    cache = [torch.zeros(1, 1, 16, 16, device=device).to(dtype) for _ in range(2)]
    scales = [torch.zeros(1, 1, 16, device=device) for _ in range(2)]

    store_kv(*cache, k, k, torch.arange(2, device=device), *scales)

    assert torch.isfinite(scales[0][0, 0, 0]) and torch.isnan(scales[0][0, 0, 1])


def test_every_half_way_case_of_e4m3_goes_to_the_even_neighbour(device: torch.device) -> None:
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between.nextafter(torch.tensor(torch.inf)), between.nextafter(torch.tensor(-torch.inf)), torch.zeros(7)])
    x = torch.stack([x, -x]).view(-1, 1, 16).to(device)
    k_cache, v_cache = (torch.zeros(-(-len(x) // 16), 1, 16, 16, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scales = [torch.zeros(len(k_cache), 1, 16, device=device) for _ in range(2)]
    ones = torch.ones(1, device=device)

    store_kv(k_cache, v_cache, x, x, torch.arange(len(x), device=device), *scales, (ones, ones))

    assert torch.equal(v_cache.view(-1, 16)[: len(x)].view(torch.uint8), x[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))


REFUSALS = {
    "heads of 72 values": lambda c: {"q": c.q[..., :8].repeat(1, 1, 9), "k": torch.zeros(1, 2, 72, 16), "v": torch.zeros(1, 2, 16, 72)},
    "blocks of 8 tokens": lambda c: {"k": c.k[..., :8].contiguous(), "v": c.v[:, :, :8].contiguous()},
    "3 query heads on 2 KV heads": lambda c: {"q": c.q[:, :3]},
    "a cache of torch.int32": lambda c: {"k": c.k.int(), "v": c.v.int()},
    "q of torch.float64": lambda c: {"q": c.q.double()},
    "q whose heads are not contiguous": lambda c: {"q": c.q.transpose(1, 2).contiguous().transpose(1, 2)},
    "v of torch.float32": lambda c: {"v": c.v.float()},
    "with k_scale": lambda c: {"k_scale": torch.ones(1)},
    "sequence of torch.int64": lambda c: {"sequence": c.sequence.long()},
    "position of torch.int32 [2]": lambda c: {"position": c.position[:2]},
    "tables of torch.int64": lambda c: {"tables": c.tables.long()},
    "sinks that are not [4]": lambda c: {"sinks": c.sinks[:2]},
    "k that is not contiguous": lambda c: {"k": c.k.transpose(0, 1).contiguous().transpose(0, 1)},
    "sequence and q on different devices": lambda c: {"sequence": c.sequence.to("meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_attention_does_not_take_is_said(message: str, device: torch.device) -> None:
    cache = Cache(device, lengths=(1, 2))
    names = ("q", "k", "v", "k_scale", "v_scale", "tables", "sequence", "position", "sinks")
    call = {name: getattr(cache, name) for name in names} | REFUSALS[message](cache)

    with pytest.raises(ValueError, match="paged_attention: ") as refusal:
        paged_attention(**call, scale=1.0)

    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots of torch.int32"), ({"v": torch.zeros(2, 2, 32)}, "v of torch.float32"),
        ({"k_scale": torch.zeros(1, 2, 16)}, "with k_scale"), ({"v_cache": torch.zeros(1, 2, 16, 64)}, "v_cache of torch.float32"),
    ],
    ids=["slots", "v", "scale", "cache"],
)  # fmt: skip
def test_what_is_not_stored_is_said(change: dict[str, Tensor], message: str) -> None:
    call = {
        "k_cache": torch.zeros(1, 2, 32, 16), "v_cache": torch.zeros(1, 2, 16, 32), "k": torch.zeros(2, 2, 32), "v": torch.zeros(2, 2, 32),
        "slots": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    if message == "v of torch.float32":
        change = {"v": torch.zeros(2, 2, 16)}

    with pytest.raises(ValueError, match=rf"store_kv: .*{message}"):
        store_kv(**call | change)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    file = tmp_path_factory.mktemp("compiled") / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(module.__file__).parents[2])
    for name in ("paged_attention", "store_kv"):
        command = [sys.executable, "-m", "quantkit_kernels.gpu.ahead_of_time", "--only", name, "--json", str(file.with_stem(name))]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    return [made for name in ("paged_attention", "store_kv") for made in json.loads(file.with_stem(name).read_text())]


@pytest.mark.slow
def test_every_shipped_kernel_fits_its_architecture_without_spills(compiled: list[dict]) -> None:
    assert {made["arch"] for made in compiled} == {80, 89, 90}
    assert not [made["name"] for made in compiled if made["shared"] > SHARED_BYTES[made["arch"]] or made["stack"]]


@pytest.mark.slow
def test_attention_multiplies_by_matrix_instructions_and_prefill_by_those_of_hopper(compiled: list[dict]) -> None:
    def matrix(made: dict) -> set[str]:
        return {opcode.split(".")[0] for opcode in made["instructions"] if opcode.startswith(("HMMA", "HGMMA"))}

    for made in compiled:
        if "decode" in made["name"]:
            assert matrix(made) == {"HMMA"}, made["name"]
        elif "prefill" in made["name"]:
            assert matrix(made) == ({"HGMMA"} if made["arch"] == 90 else {"HMMA"}), made["name"]
