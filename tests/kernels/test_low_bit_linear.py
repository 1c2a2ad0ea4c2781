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
from quantkit_kernels.cpu import low_bit_linear
from quantkit_kernels.cpu.build import FLAGS, library
from torch import Tensor

NATIVE = library("low_bit_linear") is not None
pytestmark = pytest.mark.skipif(not NATIVE, reason="needs a C++ compiler")
HAS = {"native": True, "x86-64-v3": torch.backends.cpu.get_cpu_capability().startswith("AVX"), "x86-64": platform.machine() in ("x86_64", "AMD64")}
CASES = [
    (63, 64, 32, 4, True, torch.float16),
    (48, 256, 128, 4, False, torch.bfloat16),
    (17, 128, 64, 3, True, torch.float16),
    (16, 192, 96, 2, False, torch.float32),
    (40, 512, 512, 8, False, torch.float32),
    (33, 256, 64, 8, True, torch.bfloat16),
    (5, 160, 32, 5, True, torch.float16),
]
"""Rows, columns, group, bits, with zero points or without, type of scales."""


@pytest.fixture(params=[march for march, is_here in HAS.items() if is_here])
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as compiled for these instructions are what is called."""
    built = library("low_bit_linear", request.param)
    assert built is not None
    monkeypatch.setattr(low_bit_linear, "library", lambda name: built)
    return request.param


def make(case: tuple) -> tuple[low_bit_linear.Packed, Tensor]:
    """A weight as the kernel has it, and in float64."""
    rows, columns, group, bits, has_zeros, kind = case
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[0] = 2**bits - 1  # the ends of the range, where integer sums are largest
    scale = (torch.rand(rows, columns // group, generator=generator) * 0.02 + 0.001).to(kind)
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator) if has_zeros else 2 ** (bits - 1)
    by_group = codes.double().view(rows, -1, group) - (zero[..., None] if has_zeros else zero)
    return low_bit_linear.pack(codes, scale, zero, bits), (by_group * scale.double()[..., None]).view(rows, columns)


def activations(count: int, columns: int) -> Tensor:
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
    x[0] = x[0].abs().amax()  # every code at the end of its range
    return x


def rounded(x: Tensor, group: int) -> Tensor:
    """In 8 bits, one scale for each run of columns, written independently of the kernel."""
    run = max(run for run in (32, 64, 128) if group % run == 0)
    runs = x.view(len(x), -1, run)
    largest = runs.abs().amax(-1, keepdim=True)
    codes = (runs.double() * (127 / largest).double()).nan_to_num().round()
    return (codes * (largest / 127).double()).view_as(x)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 13, 30])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_products_are_those_of_float64(march: str, case: tuple, count: int) -> None:
    packed, weight = make(case)
    x = activations(count, case[1])

    exact, int8 = (low_bit_linear.linear(x, packed, exact=exact) for exact in (True, False))

    expected, of_rounded = x.double() @ weight.T, rounded(x, case[2]) @ weight.T
    sizes = x.double().abs() @ weight.abs().T
    assert bool(((exact - expected).abs() <= 1e-6 * sizes).all())
    assert (int8 - of_rounded).norm() < 1e-6 * of_rounded.norm() and (int8 - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_a_row_is_the_same_to_the_bit_in_any_batch(march: str, case: tuple, exact: bool) -> None:
    packed, _ = make(case)
    x = activations(23, case[1])

    together = low_bit_linear.linear(x, packed, exact=exact)

    for size in (1, 2, 4, 5, 11):
        assert torch.equal(torch.cat([low_bit_linear.linear(part, packed, exact=exact) for part in x.split(size)]), together), size


def test_threads_do_not_change_a_bit() -> None:
    packed, _ = make((800, 256, 64, 4, True, torch.float16))
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
    ("columns", "group", "bits", "why"),
    [(96, 48, 4, "groups of 48"), (100, 32, 4, "100 columns"), (64, 64, 9, "9 bits"), (64, 32, 4, None)],
)
def test_what_it_does_not_take_is_said(columns: int, group: int, bits: int, why: str | None) -> None:
    found = low_bit_linear.why_not(columns, group, bits)

    assert found is None if why is None else why in found


def test_wrong_activations_are_refused() -> None:
    packed, _ = make(CASES[0])

    for x in (torch.zeros(2, 65), torch.zeros(64), torch.zeros(2, 64, device="meta")):
        with pytest.raises(ValueError, match=r"low_bit_linear takes \[M, 64\] on a CPU, not"):
            low_bit_linear.linear(x, packed, exact=True)


@pytest.mark.parametrize("march", [name for name, is_here in HAS.items() if is_here])
def test_nothing_is_read_or_written_out_of_bounds(march: str, tmp_path: Path) -> None:
    """Under the compiler's checkers of addresses and of undefined behaviour, in a process of its own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ with its sanitizers")
    source = Path(low_bit_linear.__file__).with_suffix(".cpp")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", f"-march={march}")
    subprocess.run([compiler, *FLAGS, *checks, str(source), "-o", str(tmp_path / "checked.so")], check=True, capture_output=True)
    preloaded = [subprocess.run([compiler, f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True).stdout.strip()
                 for name in ("asan", "ubsan")]  # fmt: skip
    script = f"""
import ctypes, sys
import pytest
from tests.kernels import test_low_bit_linear as cases
from quantkit_kernels.cpu import low_bit_linear
checked = ctypes.CDLL({str(tmp_path / "checked.so")!r})
low_bit_linear.library = lambda name: checked
for case in cases.CASES:
    packed, _ = cases.make(case)
    for count in (1, 2, 5, 13):
        for exact in (True, False):
            low_bit_linear.linear(cases.activations(count, case[1]), packed, exact=exact)
print("ran")
"""
    environment = os.environ | {"LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0 and ended.stdout.strip() == "ran", ended.stderr[-2000:]
