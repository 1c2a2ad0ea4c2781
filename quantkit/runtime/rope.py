"""Rotary embeddings that do not change with what is in a batch: factors that transformers picks by the longest position at hand are picked once."""

from __future__ import annotations

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FROZEN = "frozen"


def freeze(model: nn.Module, context: int) -> None:
    """Fix the factors of every rotary module for sequences of up to `context` tokens, as if one of that length were running.

    LongRoPE takes its long factors where the context is longer than the model's original one. Dynamic scaling changes nothing within the model's
    own context, so it keeps what it has.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind if isinstance(kind, dict) else {None: kind}
        if not any(each in ("longrope", "dynamic") for each in kinds.values()):
            continue
        for layer_type, each in kinds.items():
            if each == "longrope":
                _set_longrope(module, layer_type, context)
        module.rope_type = dict.fromkeys(kinds, _FROZEN) if isinstance(kind, dict) else _FROZEN


def _set_longrope(module: nn.Module, layer_type: str | None, context: int) -> None:
    settings = {} if layer_type is None else {"layer_type": layer_type}
    found, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, None, seq_len=context, **settings)
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    current = getattr(module, name)
    setattr(module, name, found.to(current))
