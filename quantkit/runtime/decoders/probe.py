"""What a loaded model's attention layers keep and how they attend: seen in a forward pass of its own code over a few tokens, without a cache.

In place of attention the pass mixes each token's own query, key and value, so that its logits tell one rotation, norm or order of heads from another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import QuantkitError, SourceError
from quantkit.runtime.attention import AttentionFacts
from quantkit.runtime.step import running


@dataclass(slots=True)
class Probe:
    """Notes each layer's facts the first time it attends."""

    facts: dict[int, AttentionFacts] = field(default_factory=dict)
    adapters: dict[str, Tensor] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, facts: AttentionFacts, mask: Tensor | None, others: dict[str, Any]
    ) -> Tensor:
        """Raises SourceError where the layer's attention is more than keys and values of its own in order."""
        kind, layer = type(module).__name__, module.layer_idx
        given = [name for name in ("position_bias", "indices", "block_indices") if others.get(name) is not None]
        reason = (
            "attends twice in one layer" if layer in self.facts
            else "makes a mask of its own" if mask is not None
            else f"attends by {', '.join(given)}" if given
            else "looks at later tokens" if getattr(module, "is_causal", True) is False
            else "has values wider than keys" if facts.value_width > facts.shape.dim
            else None
        )  # fmt: skip
        if reason is not None:
            raise SourceError(f"{kind} {reason}, which the paged cache does not hold; this model cannot be run by this runtime yet")
        self.facts[layer] = facts
        return mixed(q, k, v)


@dataclass(frozen=True, slots=True)
class Probed:
    """What was seen: each layer's facts in the order of layer indices, and the pass itself, to be repeated by another decoder.

    Attributes:
        ids, positions: int64 [T].
        logits: float32 [T, V].
    """

    layers: list[AttentionFacts]
    ids: Tensor
    positions: Tensor
    logits: Tensor


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, heads, value_width] of q [T, heads, dim], k and v [T, kv_heads, ...], without any sum over tokens."""
    group, width = q.shape[1] // k.shape[1], v.shape[-1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return v + torch.tanh(q * k)[..., :width]


def probe(model: nn.Module, vocabulary: int, context: int) -> Probed:
    """Run the model's own code once.

    Raises:
        SourceError: some of its layers do not attend through the interface, so that they would see nothing of earlier steps.
    """
    seen = Probe()
    device = next(model.parameters()).device
    ids = torch.tensor([number % vocabulary for number in (1, 7, 42, 99)], device=device)
    positions = torch.tensor([place % context for place in (0, 1, 5, context - 1)], device=device)
    with running(seen), torch.inference_mode():
        try:
            out = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        except QuantkitError:
            raise
        except Exception as error:  # modeling code that looks into linears or caches that are not as it knows them
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SourceError(f"{type(model).__name__} cannot be run by this runtime yet: {reason}") from error
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(seen.facts) != list(range(layers)):
        reason = f"{len(seen.facts)} of its {layers} layers keep keys and values that can be paged"
        raise SourceError(f"{type(model).__name__} cannot be run by this runtime yet: {reason}")
    return Probed([seen.facts[index] for index in range(layers)], ids, positions, out.logits[0].float())
