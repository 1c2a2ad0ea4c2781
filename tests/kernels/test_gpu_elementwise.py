"""Triton's norms, rotations and gates: what the reference says, rounded as it rounds, in any batch and from rows that lie apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quantkit_kernels import reference
from quantkit_kernels.gpu import elementwise as gpu

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6}, torch.float16: {"rtol": 1e-3, "atol": 1e-6}}
"""A unit in the last place: float32 sums in another order may round to the other side."""


def rows_apart(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """[rows, width] in the middle of wider rows of NaN."""
    x = torch.full((rows, width + 32), torch.nan)
    x[:, 16:-16] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3
    return x.to(dtype).to(device)[:, 16:-16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 60, 896, 2048])
@pytest.mark.parametrize("has_residual", [True, False], ids=["sum", "alone"])
def test_a_sum_and_its_norm(dtype: str, width: int, has_residual: bool, device: torch.device) -> None:
    x = rows_apart(5, width, TYPES[dtype], device)
    residual = rows_apart(5, width, TYPES[dtype], device, seed=1) if has_residual else None
    weight = torch.linspace(0.5, 2, width, device=device)

    found, total = gpu.add_rms_norm(x, residual, weight, 1e-5)

    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(found, expected, **NEAR[TYPES[dtype]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 40), (96, 16), (16, 0)])
def test_heads_are_turned_and_what_is_beyond_the_angles_is_kept(dtype: str, dim: int, half: int, device: torch.device) -> None:
    heads = rows_apart(4, 11 * dim, TYPES[dtype], device).unflatten(1, (11, dim))
    angles = torch.linspace(0, 9, 4 * half, device=device).view(4, half)

    found = gpu.rotate(heads, angles.cos(), angles.sin())

    torch.testing.assert_close(found, reference.rotate(heads, angles.cos(), angles.sin()), rtol=NEAR[TYPES[dtype]]["rtol"], atol=1e-5)
    assert torch.equal(found[..., 2 * half :], heads[..., 2 * half :])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 63, 1100])
def test_a_gate_on_the_halves_of_one_product(dtype: str, width: int, device: torch.device) -> None:
    gate, up = rows_apart(3, 2 * width, TYPES[dtype], device).split(width, dim=1)

    torch.testing.assert_close(gpu.silu_mul(gate, up), reference.silu_mul(gate, up), **NEAR[TYPES[dtype]])


def test_a_row_is_the_same_bits_in_any_batch(device: torch.device) -> None:
    x, residual = (rows_apart(6, 60, torch.bfloat16, device, seed) for seed in (0, 1))
    weight, angles = torch.ones(60, device=device), torch.linspace(0, 9, 60, device=device).view(6, 10)

    def every(of: slice) -> list[Tensor]:
        heads = x[of].unflatten(1, (3, 20))
        return [
            *gpu.add_rms_norm(x[of], residual[of], weight, 1e-6), gpu.rotate(heads, angles[of].cos(), angles[of].sin()),
            gpu.silu_mul(x[of], residual[of]),
        ]  # fmt: skip

    for whole, alone in zip(every(slice(None)), every(slice(4, 5)), strict=True):
        assert torch.equal(whole[4:5], alone)


def test_no_rows_are_no_work(device: torch.device) -> None:
    x = torch.zeros(0, 64, device=device)

    assert gpu.add_rms_norm(x, x, torch.ones(64, device=device), 1e-6)[0].shape == (0, 64)
    assert gpu.rotate(x.unflatten(1, (2, 32)), x[:, :16], x[:, :16]).shape == (0, 2, 32)
    assert gpu.silu_mul(x, x).shape == (0, 64)


def test_what_is_not_taken_is_said() -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(64)

    with pytest.raises(ValueError, match=r"add_rms_norm: torch.float64"):
        gpu.add_rms_norm(x.double(), None, weight, 1e-6)
    with pytest.raises(ValueError, match=r"add_rms_norm: a weight of torch.float32 \[63\]"):
        gpu.add_rms_norm(x, None, weight[:63], 1e-6)
    with pytest.raises(ValueError, match=r"rotate: angles \[2, 64\]"):
        gpu.rotate(x.unflatten(1, (2, 32)), x, x)
    with pytest.raises(ValueError, match=r"silu_mul: torch.float32 \[64, 2\] of strides \(1, 64\)"):
        gpu.silu_mul(x.T, x.T)


@pytest.mark.slow
def test_every_shipped_kernel_compiles_without_spills_for_every_architecture(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(gpu.__file__).parents[2])
    command = [sys.executable, "-m", "quantkit_kernels.gpu.ahead_of_time", "--only", "elementwise", "--json", str(tmp_path / "found.json")]

    subprocess.run(command, check=True, env=environment, capture_output=True)

    found = json.loads((tmp_path / "found.json").read_text())
    assert {made["arch"] for made in found} == {80, 89, 90}
    assert not [made["name"] for made in found if made["stack"]]
    assert all(any(opcode.startswith("LDG.E") and "128" in opcode for opcode in made["instructions"]) for made in found)
