"""Muon (Jordan et al. 2024): momentum orthogonalized by Newton-Schulz, batched over matrices of one shape.

Its steps have one size whatever the gradient, so without weight decay the matrices only grow and learning slows to a halt.
"""

from __future__ import annotations

import torch


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                directions = orthogonalize(torch.stack([self._direction(p, group["momentum"]) for p in params]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, direction in zip(params, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(p.dtype), alpha=-group["lr"] * scale)

    def _direction(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a batch. x: [num, rows, columns]."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
