"""Where a parameter of the module tree lies in a checkpoint: the tree and the file do not always use one name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

_RENAMES = ((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2."), ("lm_head.", "embed_out."))
"""Mixtral, MiniMax and GPT-NeoX files keep older names than transformers 5 gives its modules."""


class Names(Protocol):
    def __contains__(self, name: object) -> bool: ...


def find_name(parameter: str, prefix: str, names: Names) -> str | None:
    """The checkpoint's name for a parameter of the module tree, or None when the checkpoint has none.

    Args:
        prefix: the model's base prefix ("model", "transformer"), which some checkpoints leave out.
    """
    return next((candidate for candidate in _candidates(parameter, prefix) if candidate in names), None)


def _candidates(parameter: str, prefix: str) -> Iterator[str]:
    older = parameter
    for new, old in _RENAMES:
        older = older.replace(new, old)
    for name in dict.fromkeys((parameter, older)):
        yield name
        yield name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
