"""Attention over the paged cache, spoken through transformers' attention interface, so that its modeling code runs on our cache unchanged.

A step's metadata is put where the attention function finds it; the function stores the new keys and values and attends over the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from quantkit import ops
from quantkit.errors import SourceError
from quantkit.runtime.kv_cache import KVCache, LayerShape

NAME = "quantkit_paged"


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where the tokens of a step lie.

    Attributes:
        slots: int64 [T], where each token's keys and values go.
        tables: int32 [S, max_blocks].
        sequence, position: int32 [T].
    """

    cache: KVCache
    slots: Tensor
    tables: Tensor
    sequence: Tensor
    position: Tensor


@dataclass(slots=True)
class _Probe:
    """Learns the layers' shapes in a forward pass over one short text without a cache."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)


_current: StepContext | _Probe | None = None


@contextmanager
def step(context: StepContext | _Probe) -> Iterator[None]:
    """Attention within the body belongs to this step."""
    global _current
    _current = context
    try:
        yield
    finally:
        _current = None


def probe_layers(model: nn.Module, num_tokens: int = 2) -> list[LayerShape]:
    """What each attention layer of a loaded model keeps, in the order of layer indices.

    Raises:
        SourceError: some of its layers do not attend through the interface, so that they would see nothing of earlier steps.
    """
    probe = _Probe()
    device = next(model.parameters()).device
    with step(probe), torch.inference_mode():
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
        model(input_ids=tokens, position_ids=torch.arange(num_tokens, device=device)[None], use_cache=False)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)):
        reason = f"{len(probe.shapes)} of its {layers} layers keep keys and values that can be paged"
        raise SourceError(f"{type(model).__name__} cannot be run by this runtime yet: {reason}")
    return [probe.shapes[index] for index in range(layers)]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [1, heads, T, dim], key and value [1, kv_heads, T, dim]; answers [1, T, heads, dim]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = functional.pad(v, (0, q.shape[-1] - width))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(_current, _Probe):
        _current.shapes[module.layer_idx] = LayerShape(k.shape[1], k.shape[2])
        return torch.zeros(1, *q.shape[:2], width, dtype=q.dtype, device=q.device), None
    assert _current is not None, "attention outside a step"
    layer = _current.cache.layers[module.layer_idx]
    ops.store_kv(layer.k, layer.v, k, v, _current.slots, layer.k_scale, layer.v_scale)
    found = ops.paged_attention(
        q, layer.k, layer.v, layer.k_scale, layer.v_scale, _current.tables, _current.sequence, _current.position,
        scale=scale, window=sliding_window or 0, softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return found[None, ..., :width], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
