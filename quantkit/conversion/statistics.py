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

_STRIPES, _STRIPE = 16, 128
"""A Hessian is symmetric: it is summed in stripes of rows, each from the diagonal on. So many stripes, or of so many rows where that is more."""


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
        self._originals: dict[str, Tensor] = {}
        self._drifts: dict[str, tuple[Tensor, int]] = {}
        self._seen: list[tuple[ref[Tensor], str]] = []  # weakly, as an expert's own states need not outlive it
        self._valid: Tensor | None = None
        self._num_tokens = 0
        self._calls: dict[str, int] = {}
        self._longest = 0
        """Tokens of the longest whole pass so far."""
        self._any_twice = False
        self._leaves = False

    @contextmanager
    def watching(self, valid: Tensor, *, whole: bool = True) -> Iterator[None]:
        """Record during one forward pass.

        Args:
            valid: bool [B, T]; padding is not counted where tokens keep their places, and must not reach experts.
            whole: False leaves the pass when the last linear is about to run: what it gives is not recorded. Never the first pass, nor one of more
                tokens than any before: they show whether each linear is called once.
        """
        self._valid, self._num_tokens = None if bool(valid.all()) else valid.flatten(), valid.numel()
        self._leaves = not whole and not self._any_twice and self._num_tokens <= self._longest
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._modules.items()]
        try:
            yield
        except _AllSeen:
            pass
        else:
            self._longest = max(self._longest, self._num_tokens)
            self._any_twice |= max(self._calls.values(), default=0) > 1
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()
            self._originals.clear()
            self._calls.clear()

    @contextmanager
    def watching_original(self) -> Iterator[None]:
        """Keep what the original model gives each linear, in a forward pass over the tokens of the next `watching`, which then records the drift.

        Only where an input holds every token: which of them reach an expert differs between the two models.
        """

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: self._originals.update({name: inputs[0].detach()})

        handles = [module.register_forward_pre_hook(keep(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            owner = next((o for tensor, o in self._seen if tensor() is x), None)
            if owner is None:
                self._seen.append((ref(x), name))
                self._add(name, x)
            self._owner[name] = owner or name
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._leaves and len(self._calls) == len(self._modules):
                raise _AllSeen

        return hook

    def _rows(self, x: Tensor) -> Tensor:
        """Those of the input that are no padding, float32 [n, K]."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._valid is not None and rows.shape[0] == self._valid.shape[0]:
            rows = rows[self._valid.to(rows.device)]
        return rows.float()

    def _add(self, name: str, x: Tensor) -> None:
        rows = self._rows(x)
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._counts[name] = 0
        total = self._sums[name]
        for stripe in _stripes(len(total)):
            total[stripe, stripe.start :].addmm_(rows[:, stripe].T, rows[:, stripe.start :])
        self._counts[name] += rows.shape[0]
        original = self._originals.get(name)
        if original is not None and original.shape == x.shape and x.numel() == self._num_tokens * x.shape[-1]:
            self._add_drift(name, self._rows(original) - rows, rows)
        if self._sizes is not None and len(rows):
            size, none = rows.abs(), torch.zeros(rows.shape[1], device=rows.device)
            total, largest = self._sizes.get(name, (none, none))
            self._sizes[name] = total + size.sum(0), torch.maximum(largest, size.amax(0))

    def peaks(self) -> dict[str, float]:
        """The largest magnitude at the input of each linear that a token reached, where sizes are recorded."""
        largest = {owner: float(largest.max()) for owner, (_, largest) in (self._sizes or {}).items()}
        return {name: largest[owner] for name, owner in self._owner.items() if owner in largest}

    def _add_drift(self, name: str, difference: Tensor, rows: Tensor) -> None:
        total, count = self._drifts.get(name, (torch.zeros_like(self._sums[name]), 0))
        self._drifts[name] = total.addmm_(difference.T, rows), count + rows.shape[0]

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
        for stripe in _stripes(len(hessian)):
            hessian[stripe.stop :, stripe] = hessian[stripe, stripe.stop :].T
        drift, of = self._drifts.pop(owner, (None, 0))
        drift = drift.div_(count) if drift is not None and of == count else None
        if self._sizes is None:
            return Statistics(hessian, count, drift=drift)
        total, largest = self._sizes.pop(owner)
        return Statistics(hessian, count, total / count, largest, drift)


class _AllSeen(Exception):
    """Leaves a forward pass of which nothing more is recorded."""


def _stripes(width: int) -> Iterator[slice]:
    """Of the rows of a symmetric matrix."""
    step = max(_STRIPE, -(-width // _STRIPES))
    return (slice(start, min(start + step, width)) for start in range(0, width, step))
