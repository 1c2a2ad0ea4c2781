"""Functions of single values that give a value the same result wherever in a tensor it stands.

torch computes most values of a tensor by vector instructions and the last few, of the whole or of a thread's part, one by one, by another
approximation of exp or tanh that differs in the last bit. So a token's result would depend on how many tokens are beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

VECTORS = 64
"""Values that no vector loop of any processor leaves a rest of."""
SERIAL = 1 << 15
"""Values of a part: torch gives no more threads than one to so many."""
_NAMES = ("cos", "erf", "exp", "expm1", "log", "log1p", "logsigmoid", "mish", "pow", "sigmoid", "silu", "gelu", "sin", "softplus", "tanh")
_FUNCTIONS = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor, functional)
    for name in _NAMES
    if hasattr(owner, name)
}  # fmt: skip


class EvenElementwise(TorchFunctionMode):
    """While it is entered, in the thread that entered it. On CPUs; of a function's arguments only the first may be a tensor."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _FUNCTIONS and args and _is_plain(args, kwargs):
            return evenly(lambda part: function(part, *args[1:], **kwargs), args[0])
        return function(*args, **kwargs)


def evenly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of single values, of a tensor of any shape, in parts that leave no rest."""
    flat = x.reshape(-1)
    padded = functional.pad(flat, (0, -len(flat) % VECTORS)) if len(flat) % VECTORS else flat
    found = torch.cat([function(part) for part in padded.split(SERIAL)]) if len(padded) > SERIAL else function(padded)
    return found[: len(flat)].view(x.shape)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    x = args[0]
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not x.is_floating_point() or not x.numel() or kwargs.get("inplace") or "out" in kwargs:
        return False
    return not any(isinstance(other, Tensor) for other in (*args[1:], *kwargs.values()))
