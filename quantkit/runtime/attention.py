"""Attention over the paged cache, spoken through transformers' attention interface, so that its modeling code runs on our cache unchanged.

A step's metadata is put where the attention function finds it; the function stores the new keys and values and attends over the blocks.
"""

from __future__ import annotations

import threading
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
from quantkit.errors import QuantkitError, SourceError
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

    def note(self, module: nn.Module, keys: Tensor, value_width: int, mask: Tensor | None, others: dict[str, Any]) -> None:
        """Raises SourceError where the layer's attention is more than keys and values of its own in order."""
        kind, layer = type(module).__name__, module.layer_idx
        given = [name for name in ("position_bias", "indices", "block_indices") if others.get(name) is not None]
        reason = (
            "attends twice in one layer" if layer in self.shapes
            else "makes a mask of its own" if mask is not None
            else f"attends by {', '.join(given)}" if given
            else "looks at later tokens" if getattr(module, "is_causal", True) is False
            else "has values wider than keys" if value_width > keys.shape[2]
            else None
        )  # fmt: skip
        if reason is not None:
            raise SourceError(f"{kind} {reason}, which the paged cache does not hold; this model cannot be run by this runtime yet")
        self.shapes[layer] = LayerShape(keys.shape[1], keys.shape[2])


class _Current(threading.local):
    """Each thread's own step: engines may run side by side."""

    step: StepContext | _Probe | None = None


_current = _Current()


@contextmanager
def step(context: StepContext | _Probe) -> Iterator[None]:
    """Attention within the body belongs to this step."""
    _current.step = context
    try:
        yield
    finally:
        _current.step = None


def probe_layers(model: nn.Module, num_tokens: int = 2) -> list[LayerShape]:
    """What each attention layer of a loaded model keeps, in the order of layer indices.

    Raises:
        SourceError: some of its layers do not attend through the interface, so that they would see nothing of earlier steps.
    """
    probe = _Probe()
    device = next(model.parameters()).device
    with step(probe), torch.inference_mode():
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
        try:
            model(input_ids=tokens, position_ids=torch.arange(num_tokens, device=device)[None], use_cache=False)
        except QuantkitError:
            raise
        except Exception as error:  # modeling code that looks into linears or caches that are not as it knows them
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SourceError(f"{type(model).__name__} cannot be run by this runtime yet: {reason}") from error
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)):
        reason = f"{len(probe.shapes)} of its {layers} layers keep keys and values that can be paged"
        raise SourceError(f"{type(model).__name__} cannot be run by this runtime yet: {reason}")
    return [probe.shapes[index] for index in range(layers)]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [1, heads, T, dim], key and value [1, kv_heads, T, dim]; answers [1, T, heads, dim]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = functional.pad(v, (0, q.shape[-1] - width))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    context = _current.step
    if isinstance(context, _Probe):
        context.note(module, k, width, attention_mask, others)
        return torch.zeros(1, *q.shape[:2], width, dtype=q.dtype, device=q.device), None
    assert context is not None, "attention outside a step"
    layer = context.cache.layers[module.layer_idx]
    ops.store_kv(layer.k, layer.v, k, v, context.slots, layer.k_scale, layer.v_scale, layer.fixed_scales)
    found = ops.paged_attention(
        q, layer.k, layer.v, layer.k_scale, layer.v_scale, context.tables, context.sequence, context.position,
        scale=scale, window=sliding_window or 0, softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return found[None, ..., :width], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
