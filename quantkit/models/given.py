"""What the model's forward hands a block beside hidden states: nested lists, tuples and mappings of tensors, copied, compared, or without values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def copied(given: Any) -> Any:
    """The tensors in what a block was given, as they are now."""
    if isinstance(given, Tensor):
        return given.clone()
    if isinstance(given, Mapping):
        return {key: copied(value) for key, value in given.items()}
    return [copied(value) for value in given] if isinstance(given, list | tuple) else None


def on_meta(given: Any) -> Any:
    """The same without values; what blocks write into a mapping does not reach the next."""
    if isinstance(given, Tensor):
        return given.to("meta")
    if isinstance(given, Mapping):
        return {key: on_meta(value) for key, value in given.items()}
    return type(given)(map(on_meta, given)) if type(given) in (list, tuple) else given


def is_same(a: Any, b: Any) -> bool:
    """Whether two that were copied hold the same values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a is b
