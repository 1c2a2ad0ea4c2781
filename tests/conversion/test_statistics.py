"""What calibration records of a block's inputs: the mean of x x^T over real tokens, once for linears that read one input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.conversion.statistics import HessianCollector


class Attention(nn.Module):
    """Three linears that read one input, and one that reads their outcome."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))

    def linears(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


def mean_product(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def test_linears_with_one_input_share_one_hessian() -> None:
    block, x = Attention(), torch.randn(3, 5, 12)
    collector = HessianCollector(block.linears())

    with collector.watching(torch.ones(3, 5, dtype=torch.bool)):
        block(x)

    (first, shared), (second, own) = collector.shared()
    assert (first, second) == (["q", "k", "v"], ["o"])
    torch.testing.assert_close(shared.hessian, mean_product(x.reshape(-1, 12)))
    assert shared.num_tokens == own.num_tokens == 15


@pytest.mark.parametrize("width", [12, 200, 2100])
def test_a_hessian_is_symmetric_to_the_last_bit_at_any_width(width: int) -> None:
    linear, x = nn.Linear(width, 1), torch.randn(1, 40, width)
    collector = HessianCollector({"linear": linear})

    with collector.watching(torch.ones(1, 40, dtype=torch.bool)):
        linear(x)

    ((_, statistics),) = collector.shared()
    torch.testing.assert_close(statistics.hessian, mean_product(x[0]))
    assert torch.equal(statistics.hessian, statistics.hessian.T)


def test_a_pass_that_need_not_be_whole_is_left_before_the_last_linear_runs() -> None:
    block, ran, everything = Attention(), [], torch.ones(2, 5, dtype=torch.bool)
    block.o.register_forward_hook(lambda *_: ran.append("o"))
    whole, left = HessianCollector(block.linears()), HessianCollector(block.linears())
    batches = torch.randn(3, 2, 5, 12)

    for x in batches:
        with whole.watching(everything):
            block(x)
    assert len(ran) == 3
    for x in batches:
        with left.watching(everything, whole=False):
            block(x)

    assert len(ran) == 4  # the first pass is whole: it shows that no linear is called twice
    for (names, ours), (_, theirs) in zip(left.shared(), whole.shared(), strict=True):
        assert torch.equal(ours.hessian, theirs.hessian) and ours.num_tokens == theirs.num_tokens == 30, names


def test_a_pass_of_more_tokens_than_before_is_whole() -> None:
    """As a block may take tokens some at a time, and so call its linears again."""
    linear, everything = nn.Linear(12, 12), torch.ones(1, 40, dtype=torch.bool)
    collector = HessianCollector({"linear": linear})

    for count in (12, 40, 12, 40):
        with collector.watching(everything[:, :count], whole=False):
            for part in torch.randn(count, 12).split(16):
                linear(part)

    ((_, statistics),) = collector.shared()
    assert statistics.num_tokens == 104


def test_a_linear_that_is_called_twice_is_recorded_twice_though_the_pass_need_not_be_whole() -> None:
    linear, x = nn.Linear(12, 12), torch.randn(1, 5, 12)
    collector = HessianCollector({"linear": linear})

    for _ in range(2):
        with collector.watching(torch.ones(1, 5, dtype=torch.bool), whole=False):
            linear(linear(x))

    ((_, statistics),) = collector.shared()
    assert statistics.num_tokens == 20


def test_equal_values_in_two_tensors_are_two_inputs() -> None:
    q, k = nn.Linear(4, 4), nn.Linear(4, 4)
    collector = HessianCollector({"q": q, "k": k})
    x = torch.randn(1, 6, 4)

    with collector.watching(torch.ones(1, 6, dtype=torch.bool)):
        q(x)
        k(x.clone())

    assert [names for names, _ in collector.shared()] == [["q"], ["k"]]


def test_batches_add_up_to_the_whole() -> None:
    block, x = Attention(), torch.randn(6, 5, 12)
    whole, parts = HessianCollector(block.linears()), HessianCollector(block.linears())
    everything = torch.ones(6, 5, dtype=torch.bool)

    with whole.watching(everything):
        block(x)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        with parts.watching(everything[rows]):
            block(x[rows])

    for (names, one), (same, two) in zip(whole.shared(), parts.shared(), strict=True):
        assert names == same and one.num_tokens == two.num_tokens == 30
        torch.testing.assert_close(one.hessian, two.hessian)


def test_padding_is_not_counted() -> None:
    block, x = Attention(), torch.randn(2, 5, 12)
    valid = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    x[~valid] = 1e4
    collector = HessianCollector(block.linears())

    with collector.watching(valid):
        block(x)

    _, statistics = next(collector.shared())
    assert statistics.num_tokens == 7
    torch.testing.assert_close(statistics.hessian, mean_product(x[valid]))


def test_half_precision_inputs_are_summed_in_float32() -> None:
    linear, x = nn.Linear(4, 4).bfloat16(), torch.randn(1, 900, 4).bfloat16()
    collector = HessianCollector({"linear": linear})

    with collector.watching(torch.ones(1, 900, dtype=torch.bool)):
        linear(x)

    ((_, statistics),) = collector.shared()
    assert statistics.hessian.dtype == torch.float32
    torch.testing.assert_close(statistics.hessian, mean_product(x[0].float()))


def test_an_expert_counts_the_tokens_that_reach_it_and_one_without_any_has_no_statistics() -> None:
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    collector = HessianCollector({str(i): expert for i, expert in enumerate(experts)})
    x = torch.randn(10, 4)

    with collector.watching(torch.ones(2, 5, dtype=torch.bool)):
        experts[0](x[:3])
        experts[1](x[3:])

    statistics = {names[0]: found for names, found in collector.shared()}
    assert (statistics["0"].num_tokens, statistics["1"].num_tokens, statistics["2"]) == (3, 7, None)


def test_a_hessian_is_handed_out_as_it_was_summed_and_not_kept() -> None:
    block, x = Attention(), torch.randn(1, 5, 12)
    collector = HessianCollector(block.linears())
    with collector.watching(torch.ones(1, 5, dtype=torch.bool)):
        block(x)
    sums = [tensor.data_ptr() for tensor in collector._sums.values()]

    handed = [statistics.hessian.data_ptr() for _, statistics in collector.shared()]

    assert handed == sums and not collector._sums


def test_nothing_is_recorded_outside_of_watching() -> None:
    block = Attention()
    collector = HessianCollector(block.linears())

    block(torch.randn(1, 3, 12))

    assert all(statistics is None for _, statistics in collector.shared())


def mean_drift(original: Tensor, rows: Tensor) -> Tensor:
    return (original - rows).T @ rows / len(rows)


def test_the_drift_is_of_what_the_original_model_gives_in_the_same_place() -> None:
    block, x, original = Attention(), torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    collector = HessianCollector(block.linears())
    between = {}
    block.o.register_forward_pre_hook(lambda module, inputs: between.setdefault(len(between), inputs[0].detach()))

    for rows in (slice(0, 1), slice(1, 3)):
        with collector.watching_original():
            block(original[rows])
        with collector.watching(torch.ones(3, 5, dtype=torch.bool)[rows]):
            block(x[rows])

    (_, shared), (_, own) = collector.shared()
    torch.testing.assert_close(shared.drift, mean_drift(original.reshape(-1, 12), x.reshape(-1, 12)))
    of_original, of_this = (torch.cat([between[first], between[first + 2]]).reshape(-1, 12) for first in (0, 1))
    torch.testing.assert_close(own.drift, mean_drift(of_original, of_this))


def test_padding_has_no_drift() -> None:
    block, x, original = Attention(), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    valid = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    collector = HessianCollector(block.linears())

    with collector.watching_original():
        block(original)
    with collector.watching(valid):
        block(x)

    _, statistics = next(collector.shared())
    torch.testing.assert_close(statistics.drift, mean_drift(original[valid], x[valid]))


def test_linears_that_other_tokens_reach_in_the_original_model_have_no_drift() -> None:
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    collector = HessianCollector({str(i): expert for i, expert in enumerate(experts)})
    x, valid = torch.randn(10, 4), torch.ones(2, 5, dtype=torch.bool)

    for ours, theirs in ((10, 10), (6, 6)):
        with collector.watching_original():
            experts[0](x[:theirs] + 1)
            experts[1](x[-4:])
        with collector.watching(valid):
            experts[0](x[:ours])
            experts[1](x[-4:])

    statistics = {names[0]: found for names, found in collector.shared()}
    assert statistics["0"].num_tokens == 16 and statistics["0"].drift is None and statistics["1"].drift is None
