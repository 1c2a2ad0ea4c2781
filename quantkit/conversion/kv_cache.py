"""The KV cache of a conversion: where its scales will be stored, and what they are by calibration.

A scale is the largest magnitude of a layer's keys, or values, over 448; one a tensor, or one a head. Keys and values are those of the quantized
layer, as it puts them into a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from quantkit.checkpoint.writer import TensorPlan
from quantkit.core.levels import E4M3_TOP
from quantkit.core.scales import stored_scale
from quantkit.errors import CalibrationError, FormatError, RecipeError
from quantkit.formats.base import Format
from quantkit.formats.kv_scales import HOLDS_KV_SCALES, KV_CACHES, num_kv_heads
from quantkit.models.architecture import Architecture
from quantkit.models.kv_states import KVStates, attentions, handling_keys_and_values
from quantkit.models.names import KV_SCALES


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """What will be stored.

    Attributes:
        name: of `KV_CACHES`.
        heads: of keys and values in each layer.
        layers: names of the scales of (keys, values) by layer index.
    """

    name: str
    heads: int
    layers: Mapping[int, tuple[str, str]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each scale."""
        return (self.heads, 1, 1) if KV_CACHES[self.name]["strategy"] == "attn_head" else (1,)

    def tensors(self, dtype: torch.dtype) -> list[TensorPlan]:
        return [TensorPlan(name, dtype, self.shape) for names in self.layers.values() for name in names]

    def layers_of(self, block: nn.Module) -> list[int]:
        return sorted(attentions(block).keys() & self.layers.keys())


def plan_kv_cache(name: str, architecture: Architecture, fmt: Format) -> KVCachePlan:
    """Where the scales of every layer will stand.

    Raises:
        FormatError: the container has no place for them.
        RecipeError: a layer keeps no keys and values of which there could be one scale, or a head's.
    """
    if fmt.name not in HOLDS_KV_SCALES:
        raise FormatError(f"{fmt.name} has no place for the scales of a KV cache; use {' or '.join(HOLDS_KV_SCALES)}, or leave --kv-cache out")
    found, text = attentions(architecture.model), architecture.config.get_text_config()
    recurrent = {layer for layer, kind in enumerate(getattr(text, "layer_types", None) or ()) if kind == "linear_attention"}
    without = [layer for layer in range(text.num_hidden_layers) if layer not in found or layer in recurrent]
    if without:
        raise RecipeError(f"layer {without[0]} of {type(architecture.model).__name__} keeps no keys and values; leave --kv-cache out")
    latent = [path for path, module in found.values() if getattr(module, "kv_lora_rank", None)]
    if latent:
        raise RecipeError(f"engines keep latents of {latent[0]} in place of keys and values, and have no scales for them; leave --kv-cache out")
    linears = {linear.path: linear.name for block in architecture.blocks for linear in block.linears}
    layers = {layer: _names(path, linears) for layer, (path, _) in sorted(found.items())}
    return KVCachePlan(name, num_kv_heads(architecture), layers)


def _names(path: str, linears: Mapping[str, str]) -> tuple[str, str]:
    """In the checkpoint's own spelling of the module, which its linears show."""
    for linear, name in linears.items():
        local = linear.removeprefix(f"{path}.")
        if local != linear and name.endswith(f".{local}"):
            path = name.removesuffix(f".{local}")
            break
    keys, values = KV_SCALES
    return f"{path}.{keys}", f"{path}.{values}"


@dataclass(eq=False, slots=True)
class KVPeaks:
    """The largest magnitudes of keys and values, float32 [heads] each, by layer index."""

    peaks: dict[int, KVStates] = field(default_factory=dict)
    _valid: Tensor | None = None

    @contextmanager
    def watching(self, block: nn.Module, valid: Tensor) -> Iterator[None]:
        """Record during forward passes of a block; `valid` is bool [B, T], and what is none is padding."""
        self._valid = None if bool(valid.all()) else valid
        with handling_keys_and_values(block, self._record):
            yield

    def _record(self, layer: int, keys: Tensor, values: Tensor) -> KVStates:
        found = self._largest(keys), self._largest(values)
        before = self.peaks.get(layer, found)
        self.peaks[layer] = torch.maximum(before[0], found[0]), torch.maximum(before[1], found[1])
        return keys, values

    def _largest(self, states: Tensor) -> Tensor:
        size = states.detach().abs().float()
        if self._valid is not None:
            size = size.masked_fill(~self._valid.to(size.device)[:, None, :, None], 0)
        return size.amax((0, 2, 3)).cpu()

    def scales(self, plan: KVCachePlan, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The scales of one layer by the names they are stored under.

        Raises:
            CalibrationError: its attention put nothing into a cache, or not what the plan is for.
        """
        if layer not in self.peaks:
            raise CalibrationError(f"layer {layer} put no keys and values into its cache; leave --kv-cache out")
        return {name: _scale(peak, plan, name, dtype) for name, peak in zip(plan.layers[layer], self.peaks[layer], strict=True)}


def _scale(peak: Tensor, plan: KVCachePlan, name: str, dtype: torch.dtype) -> Tensor:
    """A head that was always 0 takes the layer's, and a layer that was takes 1: whatever it is divided by is 0."""
    if prod(plan.shape) not in (1, len(peak)):
        raise CalibrationError(f"{name}: the layer keeps {len(peak)} heads, and the config says {plan.heads}; leave --kv-cache out")
    if not bool(torch.isfinite(peak).all()):
        raise CalibrationError(f"{name}: keys or values are infinite or NaN on calibration data; the model is most likely damaged")
    whole = peak.max() if peak.max() > 0 else torch.tensor(E4M3_TOP)
    peak = torch.where(peak > 0, peak, whole) if prod(plan.shape) > 1 else whole
    return stored_scale(peak / E4M3_TOP, dtype).to(dtype).reshape(plan.shape)
