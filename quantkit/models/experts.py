"""Fused experts (transformers 5 keeps all experts of a layer in two 3-D parameters) as one Linear per expert matrix.

Checkpoints of these models store experts one by one, and calibration wants to see each expert's own input; so the module tree is brought to the
checkpoint's shape before anything is loaded. Experts of another layout (transposed, interleaved, with biases) stay fused and are reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class SeparateExperts(nn.ModuleList):
    """Every expert on the tokens routed to it; the signature is the fused module's own."""

    valid: Tensor | None = None
    """bool [tokens] while padding is skipped."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        if self.valid is not None:
            top_k_index = top_k_index.masked_fill(~self.valid.to(top_k_index.device)[:, None], -1)
        for number, expert in enumerate(self):
            token, position = torch.where(top_k_index == number)
            if token.numel():
                weighted = expert(hidden_states[token]) * top_k_weights[token, position, None]
                out.index_add_(0, token, weighted.to(out.dtype))
        return out


@contextmanager
def skipping_padding(block: nn.Module, valid: Tensor) -> Iterator[None]:
    """Route no token of the forward pass to an expert that `valid`, bool [B, T], calls padding."""
    experts = [module for module in block.modules() if isinstance(module, SeparateExperts)]
    for module in experts:
        module.valid = valid.flatten()
    try:
        yield
    finally:
        for module in experts:
            module.valid = None


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds its experts' matrices in 3-D parameters."""
    return any(p.ndim == 3 for p in module.parameters(recurse=False))


def can_separate(module: nn.Module) -> bool:
    """Whether the fused experts are of the plain kind: gate and up side by side, rows as outputs, no biases."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    plain = getattr(module, "is_concatenated", True) and getattr(module, "has_gate", True)
    odd = getattr(module, "is_transposed", False) or getattr(module, "has_bias", False) or getattr(module, "has_post_expert_norm", False)
    return names == {"gate_up_proj", "down_proj"} and bool(plain) and not odd and hasattr(module, "act_fn")


def separate(module: nn.Module) -> SeparateExperts:
    """The same experts as Linears without values (meta device)."""
    count, hidden, intermediate = module.down_proj.shape
    with torch.device("meta"):
        return SeparateExperts(Expert(hidden, intermediate, module.down_proj.dtype, module.act_fn) for _ in range(count))
