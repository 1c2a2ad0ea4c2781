"""Triton products with weights in groups: what float64 gives, equal to the bit in any batch where asked, and compiled to matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from quantkit_kernels import reference
from quantkit_kernels.gpu import low_bit_linear
from quantkit_kernels.gpu.ahead_of_time import ARCHITECTURES, SHARED_BYTES, Compiled
from triton.runtime.interpreter import InterpreterBuilder

UNEVEN = torch.linspace(-1, 0.9, 16) ** 3
LEVELS = {
    "e2m1": torch.tensor(reference.E2M1), "uneven": UNEVEN, "e4m3": reference.every_e4m3(),
}  # fmt: skip
CASES = [
    (63, 64, 32, 4, "zeros", torch.float16),
    (60, 256, 128, 4, "int", torch.bfloat16),
    (130, 128, 64, 3, "zeros", torch.float16),
    (16, 192, 96, 2, "int", torch.float32),
    (33, 160, 160, 4, "zeros", torch.bfloat16),
    (17, 1088, 64, 4, "int", torch.float32),
    (20, 96, 16, 4, "zeros", torch.float32),
    (40, 288, 288, 8, "int", torch.float32),
    (33, 192, 64, 8, "zeros", torch.bfloat16),
    (5, 160, 32, 5, "zeros", torch.float16),
    (37, 96, 16, 4, "e2m1", torch.float32),
    (63, 96, 32, 4, "e2m1", torch.bfloat16),
    (37, 256, 64, 4, "uneven", torch.bfloat16),
    (21, 96, 32, 4, "uneven", torch.float16),
    (18, 384, 192, 8, "e4m3", torch.float32),
    (33, 96, 32, 8, "e4m3", torch.bfloat16),
]
"""Rows, columns, group, bits, what codes stand for (integers with zero points, or without), type of scales."""
FAST = {torch.float32: 1e-3, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Relative error by the type of x and y: TF32, and one rounding each of weights, scales and y."""
EXACT = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""The same where only y is rounded."""


def names(case: tuple) -> str:
    return "-".join(map(str, case[:5]))


def make(case: tuple, device: torch.device) -> tuple[low_bit_linear.Packed, Tensor, tuple]:
    """A weight as the kernel has it, in float64, and as `reference.low_bit_linear` takes it."""
    rows, columns, group, bits, kind, scale_type = case
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[0] = 2**bits - 1
    if kind == "e4m3":
        codes[codes & 127 == 127] -= 1  # which are no numbers
    levels = LEVELS.get(kind)
    scale = (torch.rand(rows, columns // group, generator=generator) * 0.02 + 0.001).to(scale_type)
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator) if kind == "zeros" else 2 ** (bits - 1)
    values = (codes.double() if levels is None else levels.double()[codes.long()]).view(rows, -1, group)
    if levels is None:
        values = values - (zero.double()[..., None] if isinstance(zero, Tensor) else zero)
    codes, scale, zero = (each.to(device) if isinstance(each, Tensor) else each for each in (codes, scale, zero))
    weight = (values.to(device) * scale.double()[..., None]).view(rows, columns)
    plain = (codes, scale, zero if levels is None else 0, None, functional.linear, None if levels is None else levels.to(device))
    return low_bit_linear.pack(codes, scale, zero, bits, levels), weight, plain


def activations(count: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(device)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (17, torch.float16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_products_are_those_of_float64(case: tuple, count: int, dtype: torch.dtype, device: torch.device) -> None:
    packed, weight, _ = make(case, device)
    x = activations(count, case[1], device).to(dtype)

    expected = x.double() @ weight.T

    for exact, tolerance in ((True, EXACT[dtype]), (False, FAST[dtype])):
        found = low_bit_linear.linear(x, packed, exact=exact)
        assert found.dtype == dtype and found.shape == expected.shape
        assert error(found, expected) < tolerance, exact


@pytest.mark.parametrize("count", [33, 65])
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[14]], ids=names)
def test_products_of_more_rows_are_those_of_float64(case: tuple, count: int, device: torch.device) -> None:
    packed, weight, _ = make(case, device)
    x = activations(count, case[1], device).bfloat16()

    assert error(low_bit_linear.linear(x, packed, exact=False), x.double() @ weight.T) < FAST[torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=names)
def test_products_are_those_of_the_reference(case: tuple, device: torch.device) -> None:
    packed, _, plain = make(case, device)
    x = activations(3, case[1], device)

    torch.testing.assert_close(low_bit_linear.linear(x, packed, exact=True), reference.low_bit_linear(x, *plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_row_is_the_same_to_the_bit_in_any_batch(case: tuple, device: torch.device) -> None:
    packed, _, _ = make(case, device)
    x = activations(19, case[1], device)

    together = low_bit_linear.linear(x, packed, exact=True)

    for part in (slice(0, 1), slice(1, 4), slice(2, 19), slice(18, 19)):
        assert torch.equal(low_bit_linear.linear(x[part], packed, exact=True), together[part]), part


def test_few_tiles_are_split_along_columns_and_added_in_order(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    packed, weight, _ = make(CASES[5], device)
    x, launched = activations(2, 1088, device), []
    add = low_bit_linear._add

    class Counted:
        def __getitem__(self, grid: tuple) -> object:
            return lambda *args, **options: (launched.append(args[3]), add[grid](*args, **options))

    monkeypatch.setattr(low_bit_linear, "_add", Counted())
    found = [low_bit_linear.linear(x, packed, exact=False) for _ in range(2)]

    assert launched == [4, 4] and torch.equal(*found)
    assert error(found[0], x.double() @ weight.T) < FAST[torch.float32]


@pytest.mark.parametrize("power", [-30, 14])
def test_weights_beyond_the_range_of_float16_are_multiplied_in_it(power: int, device: torch.device) -> None:
    codes = torch.randint(0, 16, (20, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    x = (activations(3, 96, device).clamp(-3, 3) * 2.0 ** min(14, -power)).half()

    found = low_bit_linear.linear(x, low_bit_linear.pack(codes, torch.full((20, 3), 2.0**power, device=device), 8, 4), exact=False)

    assert error(found, x.double() @ ((codes.double() - 8) * 2.0**power).T) < FAST[torch.float16]


def test_no_rows_and_rows_of_zeros(device: torch.device) -> None:
    packed, _, _ = make(CASES[0], device)

    for exact in (True, False):
        assert low_bit_linear.linear(torch.empty(0, 64, device=device), packed, exact=exact).shape == (0, 63)
        assert torch.equal(low_bit_linear.linear(torch.zeros(3, 64, device=device), packed, exact=exact), torch.zeros(3, 63, device=device))


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_no_number_stays_in_its_row(exact: bool, device: torch.device) -> None:
    packed, _, _ = make(CASES[1], device)
    x = activations(5, 256, device)
    before = low_bit_linear.linear(x, packed, exact=exact)
    x[2, 77] = float("nan")

    found = low_bit_linear.linear(x, packed, exact=exact)

    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@pytest.mark.parametrize("case", CASES, ids=names)
def test_nothing_around_its_tensors_is_read_or_written(case: tuple, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Every tensor is cut out of a larger one of NaN, or of bytes that would change the result; the interpreter's addresses are looked at as well."""
    packed, _, _ = make(case, device)
    x, larger = activations(17, case[1], device), []
    expected = [low_bit_linear.linear(x, packed, exact=exact) for exact in (True, False)]
    empty = torch.empty

    def cut_out(tensor: Tensor) -> Tensor:
        around = torch.full((tensor.numel() + 512,), float("nan") if tensor.is_floating_point() else 113, dtype=tensor.dtype, device=device)
        around[256:-256] = tensor.flatten()
        larger.append(around)
        return around[256:-256].view(tensor.shape)

    watched = {name: Watched(getattr(low_bit_linear, name), monkeypatch) for name in ("_linear", "_add")}
    for name, kernel in watched.items():
        monkeypatch.setattr(low_bit_linear, name, kernel)
    fields = {name: cut_out(each) for name in ("codes", "scales", "zeros", "levels") if (each := getattr(packed, name)) is not None}
    packed, x = replace(packed, **fields), cut_out(x)
    monkeypatch.setattr(low_bit_linear.torch, "empty", lambda *size, **options: cut_out(empty(*size, **options).fill_(float("nan"))))
    found = [low_bit_linear.linear(x, packed, exact=exact) for exact in (True, False)]
    monkeypatch.undo()

    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    for around in larger:
        edges = torch.cat([around[:256], around[-256:]])
        assert bool((edges.isnan() if around.is_floating_point() else edges == 113).all())


class Watched:
    """A kernel whose addresses, where it is interpreted, must all be of tensors it was given."""

    def __init__(self, kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid: tuple) -> object:
        def launch(*args: object, **options: object) -> None:
            tensors = [each for each in args if isinstance(each, Tensor)]
            ends = [(each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in tensors]
            if tensors[0].device.type == "cpu":
                for name in ("create_masked_load", "create_masked_store"):
                    self.monkeypatch.setattr(InterpreterBuilder, name, within(getattr(InterpreterBuilder, name), ends))
            self.kernel[grid](*args, **options)

        return launch


def within(access: object, ends: list[tuple[int, int]]) -> object:
    access = getattr(access, "watched", access)

    def checked(self: object, ptrs: object, *others: object) -> object:
        mask = others[0] if access.__name__ == "create_masked_load" else others[1]
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(at.shape, dtype=bool)
        for first, last in ends:
            inside |= (at >= first) & (at + size <= last)
        assert inside.all()
        return access(self, ptrs, *others)

    checked.watched = access
    return checked


def test_wrong_activations_are_refused(device: torch.device) -> None:
    packed, _, _ = make(CASES[0], device)
    takes = r"low_bit_linear takes \[M, 64\] in float32, bfloat16 or float16 on"

    for x in (torch.zeros(2, 65), torch.zeros(64), torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.int32)):
        with pytest.raises(ValueError, match=takes):
            low_bit_linear.linear(x.to(device), packed, exact=True)
    with pytest.raises(ValueError, match=takes):
        low_bit_linear.linear(torch.zeros(2, 64, device="meta"), packed, exact=True)


@pytest.mark.parametrize("lay", ["transposed", "strided", "misaligned", "uneven rows"])
def test_rows_that_do_not_lie_as_the_kernel_reads_them_are_refused(lay: str, device: torch.device) -> None:
    packed, _, _ = make(CASES[0], device)
    room = torch.zeros(1024, device=device)
    x = {
        "transposed": room[:256].view(64, 4).T, "strided": room[:512].view(4, 128)[:, ::2], "misaligned": room[1:257].view(4, 64),
        "uneven rows": room[:260].view(4, 65)[:, :64],
    }[lay]  # fmt: skip

    with pytest.raises(ValueError, match=r"low_bit_linear takes rows .* call x\.contiguous\(\)"):
        low_bit_linear.linear(x, packed, exact=True)
    assert low_bit_linear.linear(x.clone(memory_format=torch.contiguous_format), packed, exact=True).shape == (4, 63)


def test_a_row_of_any_stride_and_rows_of_a_wider_tensor_are_taken(device: torch.device) -> None:
    packed, _, _ = make(CASES[0], device)
    wide = activations(4, 128, device)

    expected = low_bit_linear.linear(wide[:, :64].contiguous(), packed, exact=True)

    assert torch.equal(low_bit_linear.linear(wide[:, :64], packed, exact=True), expected)
    assert torch.equal(low_bit_linear.linear(wide[0, :64].contiguous()[:, None].T, packed, exact=True), expected[:1])


@pytest.mark.parametrize(
    ("columns", "group", "bits", "why"),
    [
        (96, 48, 4, "groups of 48"), (100, 32, 4, "100 columns"), (64, 64, 9, "9 bits"), (64, 32, 4, None), (64, 16, 4, None),
        (64, 16, 8, "groups of 16"), (48, 16, 4, "48 columns"), (96, 96, 8, None),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_said(columns: int, group: int, bits: int, why: str | None) -> None:
    for exact in (True, False):
        found = low_bit_linear.why_not(columns, group, bits, exact=exact)
        assert found is None if why is None else why in found


def test_other_levels_and_zero_points_are_refused_and_so_are_codes_that_are_no_numbers() -> None:
    codes, scale = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1)

    with pytest.raises(ValueError, match="levels are 256; the kernel takes 16, or the 256 of"):
        low_bit_linear.pack(codes, scale, 0, 8, torch.arange(256.0))
    with pytest.raises(ValueError, match="zero points from 0 to 200; of 4 bits it takes 0 to 127"):
        low_bit_linear.pack(codes, scale, torch.tensor([0] * 15 + [200])[:, None], 4)
    with pytest.raises(ValueError, match=r"codes of torch\.float8_e4m3fn that are no numbers"):
        low_bit_linear.pack(codes + 127, scale, 0, 8, LEVELS["e4m3"])


def test_a_rule_of_the_gpu_at_hand_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    packed, _, _ = make(CASES[1], device)
    tiles = {"block_n": 128, "block_m": 16, "block_k": 64, "warps": 4, "stages": 2}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps([{"exact": False, "rows": 8, "n": 60, "k": 256, "kind": "int4", "tiles": tiles}]))
    (tmp_path / "default.json").write_text((low_bit_linear._TUNED / "default.json").read_text())
    monkeypatch.setattr(low_bit_linear, "_TUNED", tmp_path)

    rules = low_bit_linear._rules.__wrapped__("NVIDIA H200")
    monkeypatch.setattr(low_bit_linear, "_rules", lambda name: rules)

    found = [low_bit_linear.tiles_for(rows, packed, torch.bfloat16, exact=False).block_n for rows in (8, 9)]
    assert found == [128, 64] and low_bit_linear.tiles_for(8, packed, torch.bfloat16, exact=True).block_n == 32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_configurations_compile_to_matrix_instructions_and_spill_nothing(arch: int, tmp_path: Path) -> None:
    """In a process that does not interpret; without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "quantkit_kernels.gpu.ahead_of_time", "--arch", str(arch), "--only", "low_bit_linear"]
    ended = subprocess.run([*command, "--json", str(tmp_path / "found")], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = [Compiled(**each) for each in json.loads((tmp_path / "found").read_text())]

    assert len(found) == len(list(low_bit_linear.shipped()))
    for each in found:
        words = each.name.split()
        assert each.shared <= SHARED_BYTES[arch] and each.stack == 0 and each.count("I2F") == 0, each.name
        if "add" not in words:
            assert bool(each.count("HGMMA" if arch == 90 else "HMMA")) != ("exact" in words), each.name
        if arch == 90 and "64x16x" in words[-1] and not {"exact", "table4"} & set(words):
            assert each.count("STS") < 8, f"{each.name}: decoded weights go to matrix instructions by way of shared memory, not from registers"
