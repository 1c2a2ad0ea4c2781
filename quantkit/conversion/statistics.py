"""What calibration records at the linears of one block: the Hessian of each distinct input, once however many linears read it.

Which linears share an input is observed: modules that are handed the very same tensor in a forward pass share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from quantkit.methods.base import Statistics


class HessianCollector:
    """Sums x x^T over the tokens that reach each linear.

    Args:
        modules: the linears by checkpoint name, in the order of the block.
        sizes: record inputs' mean and largest sizes too.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, sizes: bool = False) -> None:
        self._modules = modules
        self._sizes: dict[str, tuple[Tensor, Tensor]] | None = {} if sizes else None
        self._owner: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seen: list[tuple[ref[Tensor], str]] = []  # weakly, as an expert's own states need not outlive it
        self._valid: Tensor | None = None

    @contextmanager
    def watching(self, valid: Tensor) -> Iterator[None]:
        """Record during one forward pass.

        Args:
            valid: bool [B, T]; padding is not counted where tokens keep their places, and must not reach experts.
        """
        self._valid = None if bool(valid.all()) else valid.flatten()
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            owner = next((o for tensor, o in self._seen if tensor() is x), None)
            if owner is None:
                self._seen.append((ref(x), name))
                self._add(name, x)
            self._owner[name] = owner or name

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._valid is not None and rows.shape[0] == self._valid.shape[0]:
            rows = rows[self._valid.to(rows.device)]
        rows = rows.float()
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._counts[name] = 0
        self._sums[name].addmm_(rows.T, rows)
        self._counts[name] += rows.shape[0]
        if self._sizes is not None and len(rows):
            size, none = rows.abs(), torch.zeros(rows.shape[1], device=rows.device)
            total, largest = self._sizes.get(name, (none, none))
            self._sizes[name] = total + size.sum(0), torch.maximum(largest, size.amax(0))

    def peaks(self) -> dict[str, float]:
        """The largest magnitude at the input of each linear that a token reached, where sizes are recorded."""
        largest = {owner: float(largest.max()) for owner, (_, largest) in (self._sizes or {}).items()}
        return {name: largest[owner] for name, owner in self._owner.items() if owner in largest}

    def shared(self) -> Iterator[tuple[list[str], Statistics | None]]:
        """Groups of linears with one input and what was seen of it; None for linears that no token reached. Each is handed out once."""
        groups: dict[str, list[str]] = {}
        for name in self._modules:
            groups.setdefault(self._owner.get(name, name), []).append(name)
        for owner, names in groups.items():
            yield names, self._take(owner)

    def _take(self, owner: str) -> Statistics | None:
        count = self._counts.pop(owner, 0)
        if not count:
            return None
        hessian = self._sums.pop(owner).div_(count)
        if self._sizes is None:
            return Statistics(hessian, count)
        total, largest = self._sizes.pop(owner)
        return Statistics(hessian, count, total / count, largest)
