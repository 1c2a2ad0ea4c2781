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

from quantkit.errors import CheckpointError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.architecture import Architecture
from quantkit.models.names import KV_SCALES, kv_scale_name

_STRATEGIES = {"tensor": "one scale a tensor", "attn_head": "one scale a head"}


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


def why_not(scheme: Mapping[str, Any] | None) -> str | None:
    """Why a cache of this scheme cannot be made, or None when it can."""
    if scheme is None:
        return None
    kind = (scheme.get("num_bits"), scheme.get("type"), scheme.get("symmetric", True))
    if kind == (8, "float", True) and (scheme.get("dynamic") or scheme.get("strategy") in _STRATEGIES):
        return None
    return f"{in_words(scheme)} is not read; quantkit reads symmetric FP8 with one scale a tensor or a head"


def in_words(scheme: Mapping[str, Any]) -> str:
    """The scheme of a cache in one phrase."""
    bits, kind, strategy = scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy")
    name = "FP8 (e4m3)" if (bits, kind) == (8, "float") else f"{bits}-bit {kind}"
    scales = "scales found while it runs" if scheme.get("dynamic") else _STRATEGIES.get(str(strategy), f"strategy {strategy}")
    return f"{name}, {scales}" + ("" if scheme.get("symmetric", True) else ", asymmetric")


def is_kv_scale(name: str) -> bool:
    """Whether a stored tensor has such a name, in one of the spellings that are in use."""
    return kv_scale_name(name).endswith(tuple(f".{leaf}" for leaf in KV_SCALES))


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
    text = architecture.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    for layer in range(text.num_hidden_layers if names else 0):
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
