"""What a layer is to be so that it makes of a drifted input what the original made of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.core.scheme import QuantSpec
from quantkit.errors import CalibrationError
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ, inverse_factor
from quantkit.methods.propagation import propagated

ROWS, COLUMNS, TOKENS = 24, 64, 400


def inputs() -> tuple[Tensor, Tensor]:
    """Original inputs [T, K] and what they have drifted to: smaller, mixed and noisy."""
    torch.manual_seed(0)
    original = torch.randn(TOKENS, COLUMNS) @ (torch.randn(COLUMNS, COLUMNS) / 8 + 0.5 * torch.eye(COLUMNS))
    mixed = 0.95 * original + 0.03 * original @ torch.randn(COLUMNS, COLUMNS)
    return original, mixed + 0.05 * torch.randn(TOKENS, COLUMNS)


def seen(original: Tensor, drifted: Tensor) -> Statistics:
    return Statistics(drifted.T @ drifted / TOKENS, TOKENS, drift=(original - drifted).T @ drifted / TOKENS)


def corrected(weight: Tensor, statistics: Statistics, *, damp: float = 0.01, share: float = 1.0) -> Tensor:
    assert statistics.drift is not None
    order = torch.randperm(COLUMNS)
    factor, _ = inverse_factor(statistics.hessian[order[:, None], order], damp)
    return propagated(weight, statistics.drift, factor, order, share=share)


def loss(weight: Tensor, of: Tensor, other: Tensor, reads: Tensor) -> Tensor:
    """||W o - Q x||^2 of each row, in float64."""
    return (of.double() @ weight.double().T - reads.double() @ other.double().T).square().sum(0)


def test_all_of_the_correction_is_the_least_squares_answer() -> None:
    original, drifted = inputs()
    weight, statistics = torch.randn(ROWS, COLUMNS), seen(original, drifted)

    found = corrected(weight, statistics, damp=1e-6)

    best = torch.linalg.lstsq(drifted.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found, best.float(), rtol=1e-3, atol=1e-3)


def test_what_is_lost_beyond_it_is_the_plain_objective_about_it() -> None:
    original, drifted = inputs()
    weight, other, statistics = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS), seen(original, drifted)
    target = corrected(weight, statistics, damp=1e-6)

    more = loss(weight, original, other, drifted) - loss(weight, original, target, drifted)

    difference = (other - target).double()
    plain = ((difference @ statistics.hessian.double()) * difference).sum(1) * TOKENS
    torch.testing.assert_close(more, plain, rtol=1e-4, atol=1e-2)


def test_inputs_that_have_not_drifted_leave_the_weight_as_it_is() -> None:
    original, _ = inputs()
    weight, statistics = torch.randn(ROWS, COLUMNS), seen(original, original)

    assert torch.equal(corrected(weight, statistics), weight)


def test_a_share_is_so_much_of_the_way() -> None:
    original, drifted = inputs()
    weight, statistics = torch.randn(ROWS, COLUMNS), seen(original, drifted)

    half, whole = (corrected(weight, statistics, share=share) for share in (0.5, 1.0))

    torch.testing.assert_close(half - weight, (whole - weight) / 2)


def test_an_input_that_was_never_on_changes_nothing() -> None:
    original, drifted = inputs()
    original[:, 5] = drifted[:, 5] = 0
    weight, statistics = torch.randn(ROWS, COLUMNS), seen(original, drifted)

    found = corrected(weight, statistics)

    assert torch.equal(found[:, 5], weight[:, 5]) and not torch.equal(found, weight)


def test_a_drift_beyond_all_numbers_is_refused() -> None:
    statistics = replace(seen(*inputs()), drift=torch.full((COLUMNS, COLUMNS), float("inf")))

    with pytest.raises(CalibrationError, match="drifted"):
        GPTQ(propagate=0.5)(torch.randn(ROWS, COLUMNS), QuantSpec(4, 32), torch.float16, statistics)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_original_output_with_it(bits: int) -> None:
    original, drifted = inputs()
    weight, statistics, spec = torch.randn(ROWS, COLUMNS), seen(original, drifted), QuantSpec(bits, 32)

    with_it, without = (GPTQ(propagate=share)(weight, spec, torch.float16, statistics).dequantize() for share in (1.0, 0.0))

    assert loss(weight, original, with_it, drifted).sum() < 0.95 * loss(weight, original, without, drifted).sum()


def test_gptq_that_knows_of_no_drift_is_plain() -> None:
    weight, statistics = torch.randn(ROWS, COLUMNS), Statistics(seen(*inputs()).hessian, TOKENS)

    first, second = (GPTQ(propagate=share)(weight, QuantSpec(4, 32), torch.float16, statistics) for share in (0.5, 0.0))

    assert first.equals(second)


def test_scaled_inputs_have_the_drift_of_what_they_were() -> None:
    original, drifted = inputs()
    scale = torch.rand(COLUMNS) + 0.5

    found = seen(original, drifted).divided(scale)

    torch.testing.assert_close(found.drift, seen(original / scale, drifted / scale).drift)
