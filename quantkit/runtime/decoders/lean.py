"""A decoder of our own for Llama and whatever is built like it: pre-norm blocks of attention and feed-forward, RMS norms, rotary positions.

There is no table of families. The parts are looked for in the model's tree, how its layers attend was observed, and what was put together has to
give the logits of the model's own code on a few tokens before it runs anything: a family that scales its residuals or norms elsewhere does not.
Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi-3, Mixtral and Qwen's mixtures are of this build; mixtures of experts run as the modules they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.ops import Mode
from quantkit.runtime.attention import AttentionFacts, attend
from quantkit.runtime.decoders.probe import Probed, mixed

Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionFacts], Tensor]
Angles = tuple[Tensor, Tensor]
"""Cosines and sines [T, 1, R / 2]: the first R values of each head are rotated, the first half of those with the second."""

NEAR: dict[Mode, float] = {"exact": 1e-3, "fast": 0.05, "int8": 0.05}
"""How far logits may lie from the model's own, relative to their spread: kernels round what differs in its last bit to different sides."""


class Unlike(Exception):
    """A model lacks a part, or has more than the decoder knows."""


class LeanDecoder:
    """Logits from a model's own modules, by fewer and larger operations than its code takes.

    Raises:
        Unlike: the model is not of this build.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionFacts]) -> None:
        base = _part(model, model.base_model_prefix)
        if any(facts.has_sinks for facts in layers):
            raise Unlike("its softmax has sinks")
        self.layers = layers
        self._embed, self._head, self._norm = model.get_input_embeddings(), model.get_output_embeddings(), _Norm(_part(base, "norm"))
        self._rotary = _part(base, "rotary_emb")
        by_kind = isinstance(getattr(self._rotary, "rope_type", None), dict)
        self._blocks = [_Block(module, facts, by_kind=by_kind) for module, facts in zip(_part(base, "layers"), layers, strict=True)]
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @classmethod
    def of(cls, model: nn.Module, probed: Probed, mode: Mode) -> Self | str:
        """The decoder, or why the model is not of this build."""
        try:
            decoder = cls(model, probed.layers)
            every = torch.arange(len(probed.ids), device=probed.ids.device)
            found = decoder.logits(probed.ids, probed.positions, every, attend=lambda layer, q, k, v, facts: mixed(q, k, v))
        except (Unlike, RuntimeError, TypeError, ValueError, IndexError) as error:  # parts of these names that are called in another way
            return f"it is not built like Llama: {error}"
        apart = float((found - probed.logits).square().mean().sqrt() / probed.logits.std())
        return decoder if apart < NEAR[mode] else f"built like Llama, its logits would lie {apart:.2g} of their spread from its own"

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor, *, attend: Attend = attend) -> Tensor:
        """As `Decoder.logits`."""
        x = self._embed(ids)
        angles = {kind: self._angles(x, positions, kind) for kind in {block.kind for block in self._blocks}}
        for layer, block in enumerate(self._blocks):
            x = block(x, angles[block.kind], layer, attend)
        logits = self._head(self._norm(x[rows])).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _angles(self, x: Tensor, positions: Tensor, kind: str | None) -> Angles:
        kinds = () if kind is None else (kind,)
        cos, sin = (table[0][:, None, : table.shape[-1] // 2] for table in self._rotary(x[None], positions[None], *kinds))
        return cos, sin


class _Block:
    """[T, H] through attention and feed-forward, each with a norm before it and in some families (Gemma 2 and 3) one behind it.

    Attributes:
        kind: which rotary angles it takes, where layers differ in them.
    """

    def __init__(self, module: nn.Module, facts: AttentionFacts, *, by_kind: bool) -> None:
        attention, feed = _part(module, "self_attn"), _part(module, "mlp")
        self._facts = facts
        self.kind: str | None = _part(attention, "layer_type") if by_kind else None
        has_norms_behind = hasattr(module, "pre_feedforward_layernorm")
        self._before_attention = _Norm(_part(module, "input_layernorm"))
        self._before_feed = _Norm(_part(module, "pre_feedforward_layernorm" if has_norms_behind else "post_attention_layernorm"))
        self._after_attention = _Norm(_part(module, "post_attention_layernorm")) if has_norms_behind else None
        self._after_feed = _Norm(_part(module, "post_feedforward_layernorm")) if has_norms_behind else None
        is_fused = hasattr(attention, "qkv_proj")
        self._inputs = [_part(attention, name) for name in (("qkv_proj",) if is_fused else ("q_proj", "k_proj", "v_proj"))]
        self._output = _part(attention, "o_proj")
        self._head_norms = [_Norm(_part(attention, name)) for name in ("q_norm", "k_norm")] if hasattr(attention, "q_norm") else None
        self._feed = _feed_forward(feed)

    def __call__(self, x: Tensor, angles: Angles, layer: int, attend: Attend) -> Tensor:
        found = self._attended(self._before_attention(x), angles, layer, attend)
        x = x + (found if self._after_attention is None else self._after_attention(found))
        found = self._feed(self._before_feed(x))
        return x + (found if self._after_feed is None else self._after_feed(found))

    def _attended(self, x: Tensor, angles: Angles, layer: int, attend: Attend) -> Tensor:
        shape, width = self._facts.shape, self._facts.value_width
        parts = [project(x) for project in self._inputs]
        if len(parts) == 1:
            keys, values = shape.heads * shape.dim, shape.heads * width
            parts = list(parts[0].split([parts[0].shape[1] - keys - values, keys, values], dim=1))
        q, k, v = parts[0].unflatten(1, (-1, shape.dim)), parts[1].unflatten(1, (-1, shape.dim)), parts[2].unflatten(1, (-1, width))
        if self._head_norms is not None:
            q, k = (norm(heads) for norm, heads in zip(self._head_norms, (q, k), strict=True))
        rotated = _rotate(torch.cat([q, k], dim=1), angles)
        q, k = rotated.split([q.shape[1], k.shape[1]], dim=1)
        return self._output(attend(layer, q, k, v, self._facts).flatten(1))


class _Norm:
    """x / rms(x) times the weight, or times one more than the weight (Gemma): which, the module itself says."""

    def __init__(self, module: nn.Module) -> None:
        weight = _part(module, "weight").data.float()
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float) or weight.dim() != 1:
            raise Unlike(f"{type(module).__name__} is no RMS norm that is known")
        self._eps, self._shape = eps, weight.shape
        x = torch.linspace(-1, 2, len(weight), device=weight.device)[None]
        for each in (weight, weight + 1):
            self._weight = each
            if torch.allclose(self(x), module(x), rtol=1e-4, atol=1e-5):
                return
        raise Unlike(f"{type(module).__name__} is no RMS norm that is known")

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._shape, self._weight, self._eps)


def _feed_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The gated product, or the module itself where it is something else, such as a mixture of experts."""
    activate = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    activate = functional.silu if type(activate).__name__ in ("SiLU", "SiLUActivation") else activate
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")) and activate:
        return lambda x: module.down_proj(activate(module.gate_proj(x)).mul_(module.up_proj(x)))
    return lambda x: module(x[None])[0]


def _rotate(heads: Tensor, angles: Angles) -> Tensor:
    """[T, heads, dim], each head turned by its token's angles."""
    cos, sin = angles
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    return torch.cat([*parts, heads[..., 2 * half :]] if heads.shape[-1] > 2 * half else parts, dim=-1)


def _part(module: nn.Module, name: str) -> Any:
    """Raises Unlike where the module has no such part."""
    part = getattr(module, name, None)
    if part is None:
        raise Unlike(f"{type(module).__name__} has no {name}")
    return part
