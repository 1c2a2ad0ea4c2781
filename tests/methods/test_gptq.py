"""GPTQ against a textbook in float64, against round-to-nearest, and on Hessians as real calibration leaves them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, WEIGHT_BITS, QuantSpec
from quantkit.errors import CalibrationError, RecipeError
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ, inverse_factor
from quantkit.methods.rtn import RoundToNearest, SearchedScales

ORDERS = ("group", "static", "none")


def correlated(columns: int, *, tokens: int | None = None, seed: int = 0) -> Tensor:
    """The Hessian of inputs whose features are correlated and differ in size, as a language model's do."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) @ mix * sizes
    return x.T @ x / tokens


def weights(rows: int, columns: int, *, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def objective(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> Tensor:
    """GPTQ's objective, row by row, in float64."""
    difference = (weight - q.dequantize()).double()
    return ((difference @ hessian.double()) * difference).sum(1)


def textbook(weight: Tensor, hessian: Tensor, spec: QuantSpec, damp: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, one column at a time, each group's grid spanning its weights when it is reached.

    Returns:
        The codes, and how far each was from falling to a neighbour, in codes.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    size = spec.group_size(columns)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes, margin = torch.empty_like(weight), torch.empty_like(weight)
    for i in range(columns):
        if i % size == 0:
            group = weight[:, i : i + size]
            if spec.symmetric:
                scale, zero = group.abs().amax(1) * 2 / spec.max_code, torch.full((len(group),), float(spec.mid_code), dtype=torch.float64)
            else:
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / spec.max_code
                zero = torch.round(-low / scale).clamp(0, spec.max_code)
        target = weight[:, i] / scale + zero
        codes[:, i] = torch.round(target).clamp(0, spec.max_code)
        margin[:, i] = 0.5 - (target - torch.round(target)).abs()
        error = (weight[:, i] - (codes[:, i] - zero) * scale) / factor[i, i]
        weight[:, i:] -= error[:, None] * factor[i, None, i:]
    return codes.to(torch.uint8), margin


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (256, 64), (192, 128 + 64), (172, CHANNEL)], ids=lambda n: str(n))
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_plain_gptq_equals_the_textbook_code_for_code(bits: int, columns: int, group: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, group, symmetric)
    weight, hessian = weights(24, columns), correlated(columns)

    q = GPTQ(order="none", search=False, descent=0, block=64)(weight, spec, torch.float32, Statistics(hessian, 4 * columns))

    expected, margin = textbook(weight, hessian, spec, 0.01)
    for row in range(len(weight)):
        differing = (q.codes[row] != expected[row]).nonzero()
        # a weight midway between two codes, as the largest of a symmetric group is, may fall either way; what follows it in its row then differs
        assert not len(differing) or margin[row, differing[0]] < 1e-3, (row, differing[0], margin[row, differing[0]])
    assert (q.codes == expected).float().mean() > 0.95


@pytest.mark.parametrize("block", [1, 48, 64, 500])
def test_the_block_size_changes_no_result(block: int) -> None:
    spec, weight, hessian = QuantSpec(4, 32), weights(16, 160), correlated(160)
    whole = GPTQ(descent=0)(weight, spec, torch.float32, Statistics(hessian, 640))

    q = GPTQ(descent=0, block=block)(weight, spec, torch.float32, Statistics(hessian, 640))

    assert (q.codes == whole.codes).float().mean() > 0.995
    assert float(objective(weight, q, hessian).sum() / objective(weight, whole, hessian).sum()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32), QuantSpec(3, 32, False), QuantSpec(2, 64), QuantSpec(8, CHANNEL)], ids=lambda s: f"{s.bits}-{s.group}"
)
def test_each_stage_lowers_the_objective(spec: QuantSpec, seed: int) -> None:
    hessian, weight = correlated(128, seed=seed), weights(32, 128, seed=seed)
    seen = Statistics(hessian, 512)
    stages = [RoundToNearest(), GPTQ(order="none", search=False, descent=0), GPTQ(descent=0), GPTQ()]

    losses = [float(objective(weight, rounding(weight, spec, torch.float16, seen), hessian).sum()) for rounding in stages]

    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(2, 32, False), QuantSpec(4, CHANNEL)], ids=lambda s: f"{s.bits}-{s.group}")
def test_no_row_is_worse_after_more_passes_of_descent(spec: QuantSpec, order: str) -> None:
    weight, hessian = weights(32, 96), correlated(96)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)

    rows = [objective(weight, GPTQ(order=order, descent=n)(weight, spec, torch.float16, Statistics(hessian, 400)), damped) for n in range(5)]

    for before, after in pairwise(rows):
        assert bool((after <= before * (1 + 1e-4)).all()), (after / before).max()  # float32 sums


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, CHANNEL])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_codes_scales_and_zeros_stay_in_their_ranges_and_in_column_order(bits: int, group: int, symmetric: bool, order: str) -> None:
    spec, weight, hessian = QuantSpec(bits, group, symmetric), weights(7, 64), correlated(64)

    q = GPTQ(order=order)(weight, spec, torch.bfloat16, Statistics(hessian, 256))

    assert int(q.codes.max()) <= spec.max_code
    assert q.scale.dtype == torch.bfloat16 and bool((torch.isfinite(q.scale) & (q.scale != 0)).all())
    assert symmetric or (int(q.zero.min()) >= 0 and int(q.zero.max()) <= spec.max_code)
    relative = (q.dequantize() - weight).norm() / weight.norm()
    assert relative < {2: 1.0, 3: 0.6, 4: 0.3, 5: 0.15, 6: 0.08, 8: 0.02}[bits]  # columns out of order would give 1.4


@pytest.mark.parametrize("shape", [(1, 32), (63, 96), (5, 172)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_odd_shapes(shape: tuple[int, int]) -> None:
    spec = QuantSpec(4, 32 if shape[1] % 32 == 0 else CHANNEL)

    q = GPTQ()(weights(*shape), spec, torch.float16, Statistics(correlated(shape[1]), 500))

    assert q.shape == shape


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_is_rounded_alike_whatever_stands_beside_it(order: str) -> None:
    spec, hessian = QuantSpec(4, 32), correlated(96)
    query, others = weights(8, 96, seed=1), [weights(16, 96, seed=seed) * 10 for seed in (2, 3)]

    first, second = (GPTQ(order=order)(torch.cat([query, other]), spec, torch.float16, Statistics(hessian, 400)) for other in others)

    assert first.rows(0, 8).equals(second.rows(0, 8))


def test_stacked_weights_are_rounded_as_each_would_be_alone() -> None:
    spec, seen = QuantSpec(4, 32), Statistics(correlated(96), 400)
    parts = [weights(n, 96, seed=n) for n in (32, 16, 16)]

    stacked = GPTQ()(torch.cat(parts), spec, torch.float16, seen)

    alone = torch.cat([GPTQ()(part, spec, torch.float16, seen).codes for part in parts])
    assert (stacked.codes == alone).float().mean() > 0.999  # matrix products of other heights may sum in another order


def test_the_same_input_gives_the_same_bits() -> None:
    weight, seen = weights(16, 128), Statistics(correlated(128), 512)

    first, second = (GPTQ()(weight.clone(), QuantSpec(3, 64), torch.float16, seen) for _ in range(2))

    assert first.equals(second)


def test_nothing_given_is_changed() -> None:
    weight, hessian = weights(8, 64), correlated(64)
    kept = weight.clone(), hessian.clone()

    GPTQ()(weight, QuantSpec(4, 32), torch.float16, Statistics(hessian, 256))

    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_inputs_that_were_never_on_are_rounded_to_nearest_and_disturb_nobody() -> None:
    spec, dead = QuantSpec(4, 32), [3, 40, 41, 63]
    weight, hessian = weights(16, 64), correlated(64)
    hessian[dead] = 0
    hessian[:, dead] = 0
    other = weight.clone()
    other[:, dead] *= 0.5  # no range changes: these are not the largest of their groups
    rounding = GPTQ(order="none", search=False, descent=0)

    q, p = (rounding(w, spec, torch.float32, Statistics(hessian, 256)) for w in (weight, other))

    alive = [i for i in range(64) if i not in dead]
    same_range = (q.scale == p.scale).all(1)
    assert same_range.sum() > 8 and torch.equal(q.codes[same_range][:, alive], p.codes[same_range][:, alive])
    step = q.expand(q.scale)[:, dead].abs()
    is_inside = weight[:, dead].abs() < 7 * step
    assert bool(((q.dequantize() - weight)[:, dead].abs() <= step / 2 + 1e-7)[is_inside].all())


def test_a_layer_that_saw_nothing_but_zeros_is_rounded_to_nearest() -> None:
    spec, weight = QuantSpec(4, 32), weights(8, 64)

    q = GPTQ(order="none", search=False, descent=0)(weight, spec, torch.float16, Statistics(torch.zeros(64, 64), 100))

    assert q.equals(RoundToNearest()(weight, spec, torch.float16, None))


@pytest.mark.parametrize("tokens", [96, 128])
def test_fewer_tokens_than_inputs_still_round_well(tokens: int) -> None:
    weight, seen = weights(64, 128), Statistics(correlated(128, tokens=tokens), tokens)
    everything = correlated(128, tokens=20_000)  # of the same distribution

    q, p = (rounding(weight, QuantSpec(4, 32), torch.float16, seen) for rounding in (GPTQ(), SearchedScales()))

    assert objective(weight, q, everything).sum() <= objective(weight, p, everything).sum()


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_hessian_of_almost_no_tokens_is_factored(tokens: int) -> None:
    q = GPTQ()(weights(16, 96), QuantSpec(4, 32), torch.float16, Statistics(correlated(96, tokens=tokens), tokens))

    assert bool(torch.isfinite(q.dequantize()).all())


@pytest.mark.parametrize(("first", "lacking", "expected"), [(0.01, 0.05, 0.1), (0.03, 0.4, 1.0)], ids=["tenfold", "full"])
def test_damping_grows_until_the_hessian_can_be_factored(first: float, lacking: float, expected: float) -> None:
    hessian = correlated(32)
    lowest, mean = torch.linalg.eigvalsh(hessian)[0], hessian.diagonal().mean()
    hessian -= (lowest + lacking / (1 + lacking) * mean) * torch.eye(32)  # no longer positive, as rounding errors leave it

    factor, damp = inverse_factor(hessian, first)

    assert damp == pytest.approx(expected)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(32)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "inputs overflow"), (float("inf"), "inputs overflow"), (1e9, "no Cholesky factor")])
def test_a_hessian_beyond_help_is_refused(bad: float, message: str) -> None:
    hessian = correlated(32)
    hessian[3, 3:5] = hessian[3:5, 3] = bad

    with pytest.raises(CalibrationError, match=message):
        GPTQ()(weights(4, 32), QuantSpec(4, 32), torch.float16, Statistics(hessian, 100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "grup"}, "'grup'; did you mean 'group'"),
        ({"damp": 0}, "damp is 0"),
        ({"damp": "little"}, "damp is 'little'"),
        ({"damp": 2}, "up to 1"),
        ({"descent": -1}, "0 for none"),
        ({"descent": 1.5}, "number of passes"),
        ({"block": 0}, "number of columns"),
        ({"propagate": 1.5}, "share from 0 to 1"),
        ({"propagate": True}, "propagate is True"),
        ({"search": "yes"}, "true or false"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GPTQ(**settings)
