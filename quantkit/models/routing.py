"""What the experts of one block are shown while it calibrates, and how many tokens its router sent to each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.models.experts import separate_experts, skipping_padding


class Routing:
    """Counts over the forward passes of a block.

    Args:
        shows_all: let every expert see all tokens that are not padding. The block's output stays that of the routed ones.
    """

    def __init__(self, block: nn.Module, *, shows_all: bool) -> None:
        self._block, self._shows_all = block, shows_all
        self._experts = separate_experts(block)
        self._counts = [torch.zeros(len(each), dtype=torch.int64) for each in self._experts]

    @contextmanager
    def watching(self, valid: Tensor) -> Iterator[None]:
        """Count during one forward pass, in which `valid`, bool [B, T], says what is no padding."""
        for experts, counts in zip(self._experts, self._counts, strict=True):
            experts.routed, experts.shows_all = counts, self._shows_all
        try:
            with skipping_padding(self._block, valid):
                yield
        finally:
            for experts in self._experts:
                experts.routed, experts.shows_all = None, False

    def tokens(self, linears: Mapping[str, nn.Module]) -> dict[str, int]:
        """Tokens sent to the expert that a linear is of; nothing of linears that are of none."""
        names = {module: name for name, module in linears.items()}
        return {
            names[module]: int(count)
            for experts, counts in zip(self._experts, self._counts, strict=True)
            for expert, count in zip(experts, counts, strict=True)
            for module in expert.modules() if module in names
        }  # fmt: skip
