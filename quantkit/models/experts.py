"""Fused experts (transformers 5 keeps all experts of a layer in two 3-D parameters) as one Linear per expert matrix.

Checkpoints of these models store experts one by one, and calibration wants to see each expert's own input; so the module tree is brought to the
checkpoint's shape before anything is loaded. Experts of another layout (transposed, interleaved, with biases) stay fused and are reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class Expert(nn.Module):
    """One expert.

    Args:
        activate: the fused module's own: gate and up [T, 2 I] to [T, I], or up alone where there is no gate.
    """

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, activate: Callable[[Tensor], Tensor], has_gate: bool) -> None:
        super().__init__()
        if has_gate:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)
        self.has_gate, self._activate = has_gate, [activate]  # in a list, as it may belong to a module that is no part of this one

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self._activate[0](torch.cat([self.gate_proj(x), up], dim=-1) if self.has_gate else up))


class SeparateExperts(nn.ModuleList):
    """Every expert on the tokens routed to it; the signature is the fused module's own.

    Attributes:
        valid: bool [tokens] while padding is skipped.
        routed: int64 [experts] while tokens are counted: how many the router sent to each.
        shows_all: run every expert on all tokens, for those who watch its inputs; what it gives for tokens of others is let go.
    """

    valid: Tensor | None = None
    routed: Tensor | None = None
    shows_all: bool = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        if self.valid is not None:
            top_k_index = top_k_index.masked_fill(~self.valid.to(top_k_index.device)[:, None], -1)
        for number, expert in enumerate(self):
            token, position = torch.where(top_k_index == number)
            if self.routed is not None:
                self.routed[number] += token.numel()
            if self.shows_all or token.numel():
                given = expert(hidden_states)[token] if self.shows_all else expert(hidden_states[token])
                out.index_add_(0, token, (given * top_k_weights[token, position, None]).to(out.dtype))
        return out


def separate_experts(block: nn.Module) -> list[SeparateExperts]:
    """Every set of experts in a block that is run one expert after another."""
    return [module for module in block.modules() if isinstance(module, SeparateExperts)]


def expert_of(name: str) -> str | None:
    """The name of the expert that a linear of this name is of, None for one that is of none."""
    found = re.match(r".*\.experts\.\d+(?=\.)", name)
    return found[0] if found else None


@contextmanager
def skipping_padding(block: nn.Module, valid: Tensor) -> Iterator[None]:
    """Route no token of the forward pass to an expert that `valid`, bool [B, T], calls padding."""
    experts = separate_experts(block)
    for module in experts:
        module.valid = valid.flatten()
    try:
        yield
    finally:
        for module in experts:
            module.valid = None


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds its experts' matrices in 3-D parameters."""
    return not isinstance(module, _ConvNd) and any(p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def can_separate(module: nn.Module) -> bool:
    """Whether the fused experts are of transformers' plain kind: gate and up side by side or no gate, rows as outputs, no biases."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if names != {"gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"}:
        return False
    odd = ("is_transposed", "has_bias", "has_post_expert_norm")
    return hasattr(module, "_apply_gate") and module.is_concatenated and not any(getattr(module, name, False) for name in odd)


def separate(module: nn.Module) -> SeparateExperts:
    """The same experts as Linears without values (meta device)."""
    count, hidden, intermediate = module.down_proj.shape
    activate = module._apply_gate if module.has_gate else module.act_fn
    with torch.device("meta"):
        return SeparateExperts(Expert(hidden, intermediate, module.down_proj.dtype, activate, module.has_gate) for _ in range(count))
