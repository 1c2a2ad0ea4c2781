"""Experts that are shown every token still answer for their own alone, and what the router sent to each is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantkit.models.experts import Expert, SeparateExperts, expert_of
from quantkit.models.routing import Routing

NUM, WIDTH, BATCH, LENGTH = 5, 12, 2, 7


class Block(nn.Module):
    """Experts, each token to two of the first four."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = SeparateExperts(Expert(WIDTH, 20, torch.float32, gated, has_gate=True) for _ in range(NUM))
        self.chosen = torch.stack([torch.randperm(NUM - 1)[:2] for _ in range(BATCH * LENGTH)])
        self.weights = torch.rand(BATCH * LENGTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.reshape(-1, WIDTH), self.chosen, self.weights).view_as(x)

    def linears(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def rows_seen(block: Block, routing: Routing, x: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The block's answer, and how many rows each linear was handed, counted by hooks."""
    seen = dict.fromkeys(block.linears(), 0)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.update({name: seen[name] + len(inputs[0])})

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in block.linears().items()]
    with torch.no_grad(), routing.watching(valid):
        answer = block(x)
    for handle in handles:
        handle.remove()
    return answer, seen


@pytest.mark.parametrize("padded", [False, True])
def test_experts_shown_every_token_answer_for_those_routed_to_them(padded: bool) -> None:
    block, x, valid = Block(), torch.randn(BATCH, LENGTH, WIDTH), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[1, 4:] = not padded

    usual, _ = rows_seen(block, Routing(block, shows_all=False), x, valid)
    answer, seen = rows_seen(block, Routing(block, shows_all=True), x, valid)

    torch.testing.assert_close(answer, usual, atol=1e-6, rtol=1e-5)
    assert set(seen.values()) == {BATCH * LENGTH}
    with torch.no_grad():
        assert torch.equal(block(x)[valid], usual[valid]), "all is as it was afterwards"


@pytest.mark.parametrize("shows_all", [False, True])
def test_the_router_is_counted_the_same_whatever_experts_are_shown(shows_all: bool) -> None:
    block, valid = Block(), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, 5:] = False
    routing = Routing(block, shows_all=shows_all)

    for _ in range(3):
        rows_seen(block, routing, torch.randn(BATCH, LENGTH, WIDTH), valid)

    expected = 3 * torch.bincount(block.chosen[valid.flatten()].flatten(), minlength=NUM)
    found = routing.tokens(block.linears() | {"elsewhere": nn.Linear(2, 2)})
    assert found == {name: int(expected[int(name.split(".")[1])]) for name in block.linears()} and expected[-1] == 0


@pytest.mark.parametrize(
    ("name", "expert"),
    [("model.layers.3.mlp.experts.17.up_proj", "model.layers.3.mlp.experts.17"), ("a.experts.0.w1", "a.experts.0"),
     ("model.layers.3.mlp.shared_expert.up_proj", None), ("model.layers.3.mlp.experts.gate_up_proj", None)],
)  # fmt: skip
def test_a_linear_is_of_an_expert_by_its_name(name: str, expert: str | None) -> None:
    assert expert_of(name) == expert
