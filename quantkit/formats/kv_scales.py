"""The FP8 scales of keys and values that a checkpoint carries: what its `kv_cache_scheme` says, and the tensors beside each attention.

Whatever container holds the weights, the names are those of compressed-tensors: `self_attn.k_scale` and `self_attn.v_scale`, one value a tensor, or
one a head. The value is what one step of the FP8 type stands for: stored = value / scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.core.activations import fake_quantize
from quantkit.core.scheme import ActivationSpec
from quantkit.errors import CheckpointError, RecipeError, did_you_mean
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.architecture import Architecture
from quantkit.models.names import KV_SCALES

_STRATEGIES = {"tensor": "one scale a tensor", "attn_head": "one scale a head"}
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_CACHES = {"fp8": _FP8, "fp8-head": _FP8 | {"strategy": "attn_head"}}
"""The caches that can be calibrated, as `kv_cache_scheme` describes them."""
NO_KV_CACHE = "none"
HOLDS_KV_SCALES = ("compressed-tensors",)
"""Containers whose configuration can ask for such a cache; engines look at no scales beside the weights of others, or take them for strays."""

_CACHED = ActivationSpec(kind="e4m3", group=None, is_static=True)


@dataclass(eq=False, slots=True)
class KVScales:
    """What a checkpoint says of its KV cache.

    Attributes:
        is_wanted: its configuration asks for an FP8 cache; scales alone only serve one that is asked for.
        layers: (keys, values) by layer index, float32 [1] or [heads]; empty where none are stored.
        refusal: why the cache cannot be as the configuration says, or None.
    """

    is_wanted: bool = False
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    refusal: str | None = None


def read_kv_scales(opened: OpenedCheckpoint, architecture: Architecture) -> KVScales:
    """Raises CheckpointError where some layers have scales and others lack them, or a value is none."""
    scheme, names = kv_scheme(opened.reader.quantization_config), kv_scale_names(architecture)
    problems = kv_scale_problems(opened, architecture)
    if problems:
        raise CheckpointError(problems[0])
    layers = {layer: (_values(opened, pair[0]), _values(opened, pair[1])) for layer, pair in sorted(names.items())}
    return KVScales(scheme is not None, layers, why_not(scheme))


def kv_scheme(quantization_config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    found = (quantization_config or {}).get("kv_cache_scheme")
    return found if isinstance(found, Mapping) else None


def is_fp8(scheme: Mapping[str, Any]) -> bool:
    """Symmetric 8-bit floats, the only kind that engines take."""
    return (scheme.get("num_bits"), scheme.get("type"), scheme.get("symmetric", True)) == (8, "float", True)


def why_not(scheme: Mapping[str, Any] | None) -> str | None:
    """Why a cache of this scheme cannot be made, or None when it can."""
    if scheme is None:
        return None
    if is_fp8(scheme) and (scheme.get("dynamic") or scheme.get("strategy") in _STRATEGIES):
        return None
    return f"{in_words(scheme)} is not read; quantkit reads symmetric FP8 with one scale a tensor or a head"


def in_words(scheme: Mapping[str, Any]) -> str:
    """The scheme of a cache in one phrase."""
    bits, kind, strategy = scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy")
    name = "FP8 (e4m3)" if (bits, kind) == (8, "float") else f"{bits}-bit {kind}"
    scales = "scales found while it runs" if scheme.get("dynamic") else _STRATEGIES.get(str(strategy), f"strategy {strategy}")
    return f"{name}, {scales}" + ("" if scheme.get("symmetric", True) else ", asymmetric")


def kv_cache_name(asked: str | Mapping[str, Any] | None) -> str | None:
    """Which cache is meant by its name or by the keys of a `kv_cache_scheme`; None for none.

    Raises:
        RecipeError: it is none that can be calibrated.
    """
    if asked is None or asked == NO_KV_CACHE:
        return None
    if isinstance(asked, Mapping):
        for name, scheme in KV_CACHES.items():
            if scheme == {**_FP8, **asked}:
                return name
        known = "; ".join(f"{name}: {scheme}" for name, scheme in KV_CACHES.items())
        raise RecipeError(f"a KV cache of {dict(asked)} cannot be calibrated; those that can are {known}")
    if asked not in KV_CACHES:
        raise RecipeError(f"unknown KV cache {asked!r}; {did_you_mean(str(asked), [*KV_CACHES, NO_KV_CACHE])}")
    return asked


def num_kv_heads(architecture: Architecture) -> int:
    text = architecture.config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def rounded_states(scales: Mapping[int, tuple[Tensor, Tensor]], layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T, D] as an FP8 cache at these scales, [1] or [heads], gives them back."""
    of_keys, of_values = (scale.to(keys.device, keys.dtype).view(-1, 1, 1) for scale in scales[layer])
    return fake_quantize(keys, _CACHED, of_keys), fake_quantize(values, _CACHED, of_values)


def kv_scale_names(architecture: Architecture) -> dict[int, tuple[str | None, str | None]]:
    """The stored names of (keys', values') scales by layer index, for the layers that have any."""
    found = {}
    for layer, path in _attention_paths(architecture):
        key, value = (architecture.stored.find(f"{path}.{leaf}") for leaf in KV_SCALES)
        if key or value:
            found[layer] = (key, value)
    return found


def kv_scale_problems(opened: OpenedCheckpoint, architecture: Architecture) -> list[str]:
    """Scales that are absent beside others, of a shape that is neither one value nor one a head, or that divide by nothing."""
    names, problems = kv_scale_names(architecture), []
    heads = num_kv_heads(architecture) if names else 0
    for layer in range(architecture.config.get_text_config().num_hidden_layers if names else 0):
        for leaf, name in zip(KV_SCALES, names.get(layer, (None, None)), strict=True):
            if name is None:
                problems.append(f"layer {layer} has no {leaf}, and others have one")
                continue
            values = _values(opened, name)
            if len(values) not in (1, heads):
                problems.append(f"{name} is {list(opened.reader.info(name).shape)}; it is one value, or one for each of {heads} heads")
            elif not (values.isfinite() & (values > 0)).all():
                problems.append(f"{name} holds {values.tolist()[:3]}; scales are finite and above 0")
    return problems


def _attention_paths(architecture: Architecture) -> Iterator[tuple[int, str]]:
    for path, module in architecture.model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            yield layer, path


def _values(opened: OpenedCheckpoint, name: str | None) -> Tensor:
    assert name is not None
    return opened.reader.get(name).to(torch.float32).flatten()
