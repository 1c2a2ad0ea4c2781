"""Attention of one layer over the paged cache: the step at hand says where its tokens lie.

`ATTENTION` is a name in transformers' attention interface, under which its modeling code attends here unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from quantkit import ops
from quantkit.runtime.kv_cache import LayerShape
from quantkit.runtime.step import StepContext, current

ATTENTION = "quantkit_paged"


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """How one layer attends.

    Attributes:
        shape: what it keeps of a token.
        value_width: of a head; at most the keys' width, to which values are padded.
        window: keys that a token sees, its own included; 0 for all.
        softcap: 0 for none.
        has_sinks: whether every softmax has a score without a value.
    """

    shape: LayerShape
    value_width: int
    scale: float
    window: int
    softcap: float
    has_sinks: bool = False


class Observer(Protocol):
    """Stands in a step's place and attends for the layers, to see how they do."""

    adapters: dict[str, Tensor]

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, facts: AttentionFacts, mask: Tensor | None, others: dict[str, Any]
    ) -> Tensor: ...


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, facts: AttentionFacts, sinks: Tensor | None = None) -> Tensor:
    """Store a step's keys and values and attend over the blocks.

    Args:
        layer: whose cache.
        q: [T, heads, dim]; k: [T, kv_heads, dim]; v: [T, kv_heads, value_width].

    Returns:
        [T, heads, value_width].
    """
    context = current()
    assert isinstance(context, StepContext), "attention outside a step"
    cache = context.cache.layers[layer]
    if facts.value_width < q.shape[-1]:
        v = functional.pad(v, (0, q.shape[-1] - facts.value_width))
    ops.store_kv(cache.k, cache.v, k, v, context.slots, cache.k_scale, cache.v_scale, cache.fixed_scales)
    found = ops.paged_attention(
        q, cache.k, cache.v, cache.k_scale, cache.v_scale, context.tables, context.sequence, context.position,
        scale=facts.scale, window=facts.window, softcap=facts.softcap, sinks=sinks,
    )  # fmt: skip
    return found[..., : facts.value_width]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [1, heads, T, dim], key and value [1, kv_heads, T, dim]; answers [1, T, heads, dim].

    The window is the mask's, as it is for transformers' own attention; some families pass one beside it that their masks do not have, or none.
    """
    window = _window_of(attention_mask)
    if window is not None:
        sliding_window, attention_mask = window, None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    facts = AttentionFacts(LayerShape(k.shape[1], k.shape[2]), v.shape[-1], scale, sliding_window or 0, softcap or 0.0, s_aux is not None)
    context = current()
    if isinstance(context, StepContext):
        return attend(module.layer_idx, q, k, v, facts, s_aux)[None], None
    assert context is not None, "attention outside a step"
    return context.attend(module, q, k, v, facts, attention_mask, others)[None], None


def _mask(*args: Any, local_size: int | None = None, **others: Any) -> Tensor:
    """In a mask's place, what it would let a token see: int64 [1, 1, 1, 1], the keys of its window, or 0 for all."""
    return torch.full((1, 1, 1, 1), local_size or 0)


def _window_of(mask: Tensor | None) -> int | None:
    """What `_mask` put into it; None of a mask that is not its."""
    return int(mask) if mask is not None and mask.dtype == torch.int64 and mask.numel() == 1 else None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
