"""Native products with weights in groups: what float64 gives, equal to the bit in any batch, on every set of instructions this processor has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantkit_kernels import reference
from quantkit_kernels.cpu import low_bit_linear
from quantkit_kernels.cpu.build import FLAGS, library
from torch import Tensor

NATIVE = library("low_bit_linear") is not None
pytestmark = pytest.mark.skipif(not NATIVE, reason="needs a C++ compiler")
HAS = {"native": True, "x86-64-v3": torch.backends.cpu.get_cpu_capability().startswith("AVX"), "x86-64": platform.machine() in ("x86_64", "AMD64")}
E2M1 = torch.tensor(reference.E2M1)
UNEVEN = torch.linspace(-1, 0.9, 16) ** 3
LEVELS = {"e2m1": E2M1, "uneven": UNEVEN, "e4m3": reference.every_e4m3(), "int": None}
"""What codes stand for: 4-bit floats, which halves hold; a table that 8 bits hold only rounded; 8-bit floats; integers."""
CASES = [
    (63, 64, 32, 4, "zeros", torch.float16),
    (48, 256, 128, 4, "int", torch.bfloat16),
    (17, 128, 64, 3, "zeros", torch.float16),
    (16, 192, 96, 2, "int", torch.float32),
    (40, 512, 512, 8, "int", torch.float32),
    (33, 256, 64, 8, "zeros", torch.bfloat16),
    (5, 160, 32, 5, "zeros", torch.float16),
    (37, 256, 64, 4, "e2m1", torch.bfloat16),
    (63, 96, 32, 4, "uneven", torch.float16),
    (20, 256, 32, 4, "zeros", torch.float16),
    (16, 320, 32, 8, "int", torch.float16),
]
"""Rows, columns, group, bits, what codes stand for (integers with zero points, or without), type of scales."""
EXACT_CASES = [
    (37, 96, 16, 4, "e2m1", torch.float32),
    (16, 64, 16, 8, "int", torch.float16),
    (20, 128, 16, 4, "zeros", torch.float32),
    (63, 192, 96, 8, "e4m3", torch.float32),
    (33, 96, 32, 8, "e4m3", torch.bfloat16),
    (18, 64, 16, 8, "e4m3", torch.float32),
]
"""Which are multiplied by float32 activations alone."""


def names(case: tuple) -> str:
    return "-".join(map(str, case[:5]))


@pytest.fixture(params=[march for march, is_here in HAS.items() if is_here])
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as compiled for these instructions are what is called."""
    built = library("low_bit_linear", request.param)
    assert built is not None
    monkeypatch.setattr(low_bit_linear, "library", lambda name: built)
    return request.param


def make(case: tuple) -> tuple[low_bit_linear.Packed, Tensor]:
    """A weight as the kernel has it, and in float64."""
    rows, columns, group, bits, kind, scale_type = case
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[0] = 2**bits - 1  # the ends of the range, where integer sums are largest
    if kind == "e4m3":
        codes[codes & 127 == 127] -= 1  # which are no numbers
    levels = LEVELS.get(kind)
    scale = (torch.rand(rows, columns // group, generator=generator) * 0.02 + 0.001).to(scale_type)
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator) if kind == "zeros" else 2 ** (bits - 1)
    by_group = (codes.double() if levels is None else levels.double()[codes.long()]).view(rows, -1, group)
    if levels is None:
        by_group = by_group - (zero[..., None] if isinstance(zero, Tensor) else zero)
    return low_bit_linear.pack(codes, scale, zero, bits, levels), (by_group * scale.double()[..., None]).view(rows, columns)


def activations(count: int, columns: int) -> Tensor:
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
    x[0] = x[0].abs().amax()  # every code at the end of its range
    return x


def rounded(x: Tensor, group: int) -> Tensor:
    """In 8 bits, one scale for each run of columns, written independently of the kernel."""
    whole = max(run for run in (32, 64, 128) if group % run == 0)
    run = max(run for run in (32, 64, 128) if run % whole == 0 and x.shape[1] % run == 0)
    runs = x.view(len(x), -1, run)
    largest = runs.abs().amax(-1, keepdim=True)
    codes = (runs.double() * (127 / largest).double()).nan_to_num().round()
    return (codes * (largest / 127).double()).view_as(x)


def with_whole_levels(case: tuple, weight: Tensor) -> Tensor:
    """The same where a table's levels are 127 steps of the largest and 8 bits hold no others."""
    if case[4] != "uneven":
        return weight
    rows, columns, group, *_ = case
    scale = make((*case[:4], "int", case[5]))[0].scales.transpose(1, 2).reshape(-1, columns // group)[:rows].double().repeat_interleave(group, 1)
    return (weight / scale * 127).round() / 127 * scale


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 13, 30])
@pytest.mark.parametrize("case", CASES + EXACT_CASES, ids=names)
def test_products_are_those_of_float64(march: str, case: tuple, count: int) -> None:
    packed, weight = make(case)
    x = activations(count, case[1])

    exact = low_bit_linear.linear(x, packed, exact=True)

    expected = x.double() @ weight.T
    assert bool(((exact - expected).abs() <= 1e-6 * (x.double().abs() @ weight.abs().T)).all())
    if case in CASES:
        int8, of_rounded = low_bit_linear.linear(x, packed, exact=False), rounded(x, case[2]) @ with_whole_levels(case, weight).T
        assert (int8 - of_rounded).norm() < 1e-6 * of_rounded.norm() and (int8 - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("case", "exact"), [(case, True) for case in CASES + EXACT_CASES] + [(case, False) for case in CASES], ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_batch(march: str, case: tuple, exact: bool) -> None:
    packed, _ = make(case)
    x = activations(23, case[1])

    together = low_bit_linear.linear(x, packed, exact=exact)

    for size in (1, 2, 4, 5, 11):
        assert torch.equal(torch.cat([low_bit_linear.linear(part, packed, exact=exact) for part in x.split(size)]), together), size


def test_threads_do_not_change_a_bit() -> None:
    packed, _ = make((800, 256, 64, 4, "zeros", torch.float16))
    x, before = activations(9, 256), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([low_bit_linear.linear(x, packed, exact=exact) for exact in (True, False)])
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_no_rows_and_rows_of_zeros(march: str) -> None:
    packed, _ = make(CASES[0])

    for exact in (True, False):
        assert low_bit_linear.linear(torch.empty(0, 64), packed, exact=exact).shape == (0, 63)
        assert torch.equal(low_bit_linear.linear(torch.zeros(3, 64), packed, exact=exact), torch.zeros(3, 63))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_in_its_row(march: str, value: float) -> None:
    packed, _ = make(CASES[1])
    x = activations(5, 256)
    expected = [low_bit_linear.linear(x, packed, exact=exact) for exact in (True, False)]
    x[2, 77] = value

    for exact, before in zip((True, False), expected, strict=True):
        found = low_bit_linear.linear(x, packed, exact=exact)
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_half_precision_activations_and_views_are_taken() -> None:
    packed, _ = make(CASES[1])
    x = activations(4, 256).bfloat16()

    expected = low_bit_linear.linear(x.float(), packed, exact=True)

    assert torch.equal(low_bit_linear.linear(x, packed, exact=True), expected)
    assert torch.equal(low_bit_linear.linear(x.float().T.contiguous().T, packed, exact=True), expected)


@pytest.mark.parametrize(
    ("columns", "group", "bits", "exact", "why"),
    [
        (96, 48, 4, True, "groups of 48"), (100, 32, 4, True, "100 columns"), (64, 64, 9, True, "9 bits"), (64, 32, 4, False, None),
        (64, 16, 4, True, None), (64, 16, 4, False, "groups of 16"), (48, 16, 4, True, "48 columns"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_said(columns: int, group: int, bits: int, exact: bool, why: str | None) -> None:
    found = low_bit_linear.why_not(columns, group, bits, exact=exact)

    assert found is None if why is None else why in found


def test_wrong_activations_are_refused() -> None:
    packed, _ = make(CASES[0])

    for x in (torch.zeros(2, 65), torch.zeros(64), torch.zeros(2, 64, device="meta")):
        with pytest.raises(ValueError, match=r"low_bit_linear takes \[M, 64\] on a CPU, not"):
            low_bit_linear.linear(x, packed, exact=True)


def test_there_is_no_other_way_than_float32_for_some_weights_and_no_other_levels() -> None:
    for case in EXACT_CASES:
        with pytest.raises(ValueError, match=f"groups of {case[2]} by float32 activations alone"):
            low_bit_linear.linear(activations(1, case[1]), make(case)[0], exact=False)
    with pytest.raises(ValueError, match="levels are 256; the kernel takes 16, or the 256 of"):
        low_bit_linear.pack(torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1), 0, 8, torch.arange(256.0))


def test_levels_that_halves_hold_are_not_rounded() -> None:
    whole, unit = low_bit_linear.whole_levels(E2M1)

    assert unit == 0.5 and torch.equal((whole.float() - 128) * unit, E2M1)
    assert low_bit_linear.whole_levels(torch.arange(-8.0, 8))[1] == 1.0
    assert low_bit_linear.whole_levels(UNEVEN)[1] == pytest.approx(1 / 127)


@pytest.mark.parametrize("march", [name for name, is_here in HAS.items() if is_here])
def test_nothing_is_read_or_written_out_of_bounds(march: str, tmp_path: Path) -> None:
    """Under the compiler's checkers of addresses and of undefined behaviour, in a process of its own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ with its sanitizers")
    source = Path(low_bit_linear.__file__).with_suffix(".cpp")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", f"-march={march}")
    subprocess.run([compiler, *FLAGS, *checks, str(source), "-o", str(tmp_path / "checked.so")], check=True, capture_output=True)
    preloaded = [subprocess.run([compiler, f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True).stdout.strip()
                 for name in ("asan", "ubsan")]  # fmt: skip
    script = f"""
import ctypes, sys
import pytest
from tests.kernels import test_low_bit_linear as cases
from quantkit_kernels import reference
from quantkit_kernels.cpu import low_bit_linear
checked = ctypes.CDLL({str(tmp_path / "checked.so")!r})
low_bit_linear.library = lambda name: checked
for case in cases.CASES + cases.EXACT_CASES:
    packed, _ = cases.make(case)
    for count in (1, 2, 5, 13):
        for exact in (True, False) if case in cases.CASES else (True,):
            low_bit_linear.linear(cases.activations(count, case[1]), packed, exact=exact)
print("ran")
"""
    environment = os.environ | {"LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0 and ended.stdout.strip() == "ran", ended.stderr[-2000:]
