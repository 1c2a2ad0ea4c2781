"""The type of a model's KV cache, and whose scales it takes: those the checkpoint was calibrated with, where it carries them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.kv_scales import KVScales
from quantkit.runtime.kv_cache import FixedScales, LayerShape, kv_dtype

_FP8 = torch.float8_e4m3fn
_log = logging.getLogger("quantkit")


def kv_type(name: str, kv_scales: KVScales, *, source: str, model_dtype: torch.dtype) -> torch.dtype:
    """The type of this name; "auto" is FP8 where the checkpoint asks for it, else the model's.

    Raises:
        UsageError: there is no such type.
        FormatError: "auto", and the checkpoint asks for something that is not read.
    """
    wanted = kv_dtype(name, model_dtype)
    if name != "auto" or not kv_scales.is_wanted:
        if wanted != _FP8 and (kv_scales.is_wanted or kv_scales.layers):
            _log.info("KV cache of %s: %s as asked for; its checkpoint's FP8 scales are not used", source, str(wanted).removeprefix("torch."))
        return wanted
    if kv_scales.refusal:
        raise FormatError(f"the KV cache of {source}: {kv_scales.refusal}; give a kv_cache_dtype to run it with another cache")
    return _FP8


def fixed_scales(dtype: torch.dtype, kv_scales: KVScales, shapes: Sequence[LayerShape], device: torch.device) -> tuple[FixedScales, ...]:
    """The checkpoint's scales for an FP8 cache, [heads] of keys and of values a layer; none where it has none, or the cache is of another type.

    Raises:
        CheckpointError: there are not as many as the layers have heads.
    """
    if dtype != _FP8 or not kv_scales.layers:
        return ()
    return tuple(
        (_per_head(keys, shape.heads, layer, device), _per_head(values, shape.heads, layer, device))
        for layer, shape in enumerate(shapes)
        for keys, values in [kv_scales.layers[layer]]
    )


def _per_head(scale: Tensor, heads: int, layer: int, device: torch.device) -> Tensor:
    if len(scale) not in (1, heads):
        raise CheckpointError(f"layer {layer} has {heads} KV heads and {len(scale)} KV scales; there is one, or one a head")
    return scale.to(device).expand(heads)
