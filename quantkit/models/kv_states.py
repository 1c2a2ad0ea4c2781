"""Keys and values as an attention puts them into a cache, rotated and normed: seen or changed on their way, whatever the family.

Each attention is handed a cache that keeps nothing. The model itself is run without one, since with a cache transformers no longer keeps the texts
of a row apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

KVStates = tuple[Tensor, Tensor]
"""Keys and values [B, heads, T, D]."""
Handle = Callable[[int, Tensor, Tensor], KVStates]
"""Given the layer's index, keys and values, the keys and values to go on with."""

_CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What transformers has called a cache over the years."""


class _PassingCache(DynamicCache):
    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self._handle = handle

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KVStates:
        return self._handle(layer_idx, key_states, value_states)


def attentions(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Path and module of what keeps keys and values, by the layer's index: the innermost modules that know it, take a cache, and are attentions.

    Recurrent mixers take a cache too; compressed-tensors tells the two apart by their class's name as well.
    """
    known = {path: module for path, module in model.named_modules() if isinstance(getattr(module, "layer_idx", None), int)}
    outer = {path[:at] for path in known for at, letter in enumerate(path) if letter == "."}
    inner = {path: module for path, module in known.items() if path not in outer and "attention" in type(module).__name__.lower()}
    return {module.layer_idx: (path, module) for path, module in inner.items() if _cache_argument(module) is not None}


@contextmanager
def handling_keys_and_values(block: nn.Module, handle: Handle) -> Iterator[None]:
    """Within the body, what every attention of the block would put into a cache goes through `handle`."""
    cache = _PassingCache(handle)
    hooks = [module.register_forward_pre_hook(_giving(cache, module), with_kwargs=True) for _, module in attentions(block).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _giving(cache: _PassingCache, module: nn.Module) -> Any:
    name = _cache_argument(module)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {key: value for key, value in kwargs.items() if key not in _CACHE_ARGUMENTS} | {name: cache}

    return hook


def _cache_argument(module: nn.Module) -> str | None:
    parameters = signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)
