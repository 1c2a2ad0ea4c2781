"""A linear layer in the place of the model's own: its weight is held as the kernel that runs it wants it."""

from __future__ import annotations

from torch import Tensor, nn

from quantkit.ops import Linear


class PackedLinear(nn.Module):
    """y = x W^T + b, for x [..., K] of any leading shape; `shape` is (N, K)."""

    def __init__(self, product: Linear, bias: Tensor | None, shape: tuple[int, int]) -> None:
        super().__init__()
        self.product, self.bias, self.shape = product, bias, shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1]))
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], -1)
