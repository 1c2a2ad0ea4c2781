"""What engines refuse, one small rule each: a rule looks at a stored model and answers why not, or None. Facts of autumn 2026, from their sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.core.scheme import CHANNEL, Scheme
from quantkit.formats.fusion import fused_groups
from quantkit.formats.kv_scales import in_words, is_fp8, kv_scheme


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One quantized linear, [N, K] = `shape`."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """What rules look at.

    Attributes:
        container: "gptq", "compressed-tensors", "awq", "fp8", ...; None for an unquantized model.
        config: its quantization_config.
        layers: its quantized linears, where quantkit decodes the container; else empty.
        plain: names of linears that are stored unquantized.
        model_dtype, scale_dtype: of unquantized values and of scales; None where there are none.
        packs_whole_words: 3, 5 or 6-bit codes in compressed-tensors' layout from before mid-2026.
        unread: why quantkit does not decode it, or None.
    """

    container: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[StoredLayer, ...] = ()
    plain: tuple[str, ...] = ()
    model_dtype: torch.dtype | None = None
    scale_dtype: torch.dtype | None = None
    packs_whole_words: bool = False
    unread: str | None = None


Rule = Callable[[Stored], str | None]


def only_bits(*allowed: int) -> Rule:
    """Every layer is of one of these widths."""

    def rule(stored: Stored) -> str | None:
        wrong = sorted({bits(layer) for layer in stored.layers} - set(allowed))
        return f"reads {_listed(allowed)} bits, and here are layers of {_listed(wrong)}" if wrong else None

    return rule


def one_width(stored: Stored) -> str | None:
    widths = sorted({bits(layer) for layer in stored.layers})
    return f"reads one bit width a model, and here are {_listed(widths)}" if len(widths) > 1 else None


def one_scheme(stored: Stored) -> str | None:
    names = sorted({layer.scheme.name for layer in stored.layers})
    return f"takes every layer for the main scheme, and here are {_listed(names)}" if len(names) > 1 else None


def symmetric(stored: Stored) -> str | None:
    asymmetric = [layer.name for layer in stored.layers if layer.scheme.weight and not layer.scheme.weight.symmetric]
    return f"reads symmetric weights only; {_some(asymmetric)} zero points" if asymmetric else None


def only_groups(*allowed: int) -> Rule:
    """Every group size is one of these; CHANNEL for one scale a row."""

    def rule(stored: Stored) -> str | None:
        wrong = sorted({layer.scheme.weight.group for layer in stored.layers if layer.scheme.weight} - set(allowed), key=str)
        return f"its kernels take group sizes {_listed(allowed)}, not {_listed(wrong)}" if wrong else None

    return rule


def only_schemes(pattern: str, in_words: str) -> Rule:
    """Every layer's scheme has a name of this form."""

    def rule(stored: Stored) -> str | None:
        wrong = sorted({layer.scheme.name for layer in stored.layers if not re.fullmatch(pattern, layer.scheme.name)})
        return f"reads {in_words}, and here are layers of {_listed(wrong)}" if wrong else None

    return rule


def one_layout(stored: Stored) -> str | None:
    return "reads one layout a model, and here are several (mixed-precision)" if stored.config.get("format") == "mixed-precision" else None


def rows_or_blocks(stored: Stored) -> str | None:
    other = [layer.name for layer in stored.layers if layer.scheme.weight and not _has_rows_or_blocks(layer.scheme.weight.group)]
    return f"reads unpacked weights with a scale a row or a block only; {_some(other)} others" if other else None


def _has_rows_or_blocks(group: int | tuple[int, int] | None) -> bool:
    return group == CHANNEL or isinstance(group, tuple)


def grouped(stored: Stored) -> str | None:
    channel = [layer.name for layer in stored.layers if layer.scheme.weight and layer.scheme.weight.group in (None, CHANNEL)]
    return f"reads packed weights in groups only; {_some(channel)} one scale a row" if channel else None


def multiples(columns: int, rows: int) -> Rule:
    """Input and output features are multiples of these."""

    def rule(stored: Stored) -> str | None:
        wrong = [layer for layer in stored.layers if layer.shape[1] % columns or layer.shape[0] % rows]
        if not wrong:
            return None
        n, k = wrong[0].shape
        return f"wants input features in multiples of {columns} and output features of {rows}; {wrong[0].name} is {k} -> {n}"

    return rule


def in_blocks(stored: Stored) -> str | None:
    """By loading such checkpoints with transformers 5.24: the codes themselves become the weights."""
    whole = [layer.name for layer in stored.layers if layer.scheme.weight and layer.scheme.weight.group is None]
    why = "looks for a scale a block, leaves out what is called weight_scale or input_scale, and talks nonsense"
    return f"{why}; {_some(whole)} one scale a tensor, which it reads from compressed-tensors" if whole else None


def no_act_order(stored: Stored) -> str | None:
    has_groups = any(layer.scheme.weight and layer.scheme.weight.group not in (None, CHANNEL) for layer in stored.layers)
    return "refuses desc_act (columns in activation order) with groups; use static order" if stored.config.get("desc_act") and has_groups else None


def one_config_group(stored: Stored) -> str | None:
    groups = config_groups(stored)
    return f"reads one config group, and here are {len(groups)}" if len(groups) > 1 else None


def dense_packing(stored: Stored) -> str | None:
    if not stored.packs_whole_words:
        return None
    return "3, 5 and 6-bit codes are packed as before mid-2026 (32 // bits a word); convert it again to repack them"


def whole_words(stored: Stored) -> str | None:
    """The converse, for readers that know the old packing only; 2, 4 and 8 bits are the same in both."""
    odd = sorted({bits(layer) for layer in stored.layers} & {3, 5, 6})
    return f"unpacks {_listed(odd)}-bit codes in an older layout" if odd and not stored.packs_whole_words else None


def uniform_fusion(stored: Stored) -> str | None:
    """Linears that will be one share one scheme: q, k, v; gate and up; all experts of a layer."""
    schemes = {name: "none" for name in stored.plain} | {layer.name: layer.scheme.name for layer in stored.layers}
    for names in _fused_names(schemes):
        if len({schemes[name] for name in names}) > 1:
            return "joins layers that have unlike schemes here: " + ", ".join(f"{name} is {schemes[name]}" for name in _unlike(names, schemes))
    return None


def one_scheme_with_experts(stored: Stored) -> str | None:
    """By loading such checkpoints with transformers 5.24, which stacks experts before it knows which scheme is whose."""
    reason = one_scheme(stored)
    return f"with experts {reason}" if reason is not None and _experts(stored) else None


def no_experts(stored: Stored) -> str | None:
    """By loading such checkpoints with transformers 5.24: 4-bit experts do not load, 8-bit ones fail on the first token."""
    experts = _experts(stored)
    return f"stacks experts and cannot do so with what bitsandbytes stores of each; {experts[0].name} is one" if experts else None


def blocks_within_rows(stored: Stored) -> str | None:
    """A note, by running such checkpoints with bitsandbytes 0.50 on a CPU; a GPU was not tried."""
    wide = [layer for layer in stored.layers if (spec := layer.scheme.weight) and spec.is_flat and spec.group_size(layer.shape[1]) > layer.shape[1]]
    return f"on a CPU bitsandbytes fails on blocks wider than a row, as those of {wide[0].name} are" if wide else None


def no_nvfp4_experts(stored: Stored) -> str | None:
    """By loading such checkpoints with transformers 5.24, which is sane about other layers."""
    experts = [layer for layer in _experts(stored) if layer.scheme.name == "nvfp4"]
    return f"leaves out the global scale of NVFP4 experts and talks nonsense; {experts[0].name} is one" if experts else None


def marlin_experts(stored: Stored) -> str | None:
    """From vLLM's sources: experts have kernels of their own, which take less than other layers' do."""
    wrong = [layer for layer in _experts(stored) if (spec := layer.scheme.weight) and not (spec.symmetric and spec.bits in (4, 8))]
    return f"takes experts of 4 and 8 symmetric bits; {wrong[0].name} is {wrong[0].scheme.name}" if wrong else None


def plain_head(stored: Stored) -> str | None:
    head = next((layer for layer in stored.layers if layer.name in ("lm_head", "embed_out")), None)
    return f"reads the head's weight as it is, and here {head.name} is {head.scheme.name}" if head is not None else None


def damping_in_range(stored: Stored) -> str | None:
    damping = stored.config.get("damp_percent", 0.1)
    return None if isinstance(damping, int | float) and 0 < damping < 1 else f"wants damp_percent between 0 and 1 in the config; it is {damping}"


def asymmetric_packed(stored: Stored) -> str | None:
    if symmetric(stored) is None:
        return None
    if one_scheme(stored) is not None:
        return "fails on packed asymmetric weights (known bug), and with dequantize=True takes every layer for one scheme"
    return "fails on packed asymmetric weights by default (known bug); loads with quantization_config=CompressedTensorsConfig(dequantize=True)"


def scales_are_cast(stored: Stored) -> str | None:
    """A note: the values that run are not quite those stored."""
    if stored.scale_dtype is None or stored.model_dtype is None or stored.scale_dtype == stored.model_dtype:
        return None
    if all(layer.scheme.activation for layer in stored.layers):
        return None
    loss = {torch.bfloat16: "changes them by up to 0.4%", torch.float16: "overflows beyond 65504"}.get(stored.model_dtype, "loses nothing")
    return f"scales are stored as {_short(stored.scale_dtype)} and cast to the model's {_short(stored.model_dtype)} at load, which {loss}"


def marlin_pads(stored: Stored) -> str | None:
    """A note on speed."""
    ragged = [layer.name for layer in stored.layers if layer.shape[0] % 64 or layer.shape[1] % 128]
    return f"Marlin kernels work in tiles of 64 x 128; {_some(ragged)} another shape and run padded" if ragged else None


def marlin_only(stored: Stored) -> str | None:
    """A note on speed."""
    specs = [(layer.name, layer.scheme.weight) for layer in stored.layers if layer.scheme.weight]
    slow = [name for name, spec in specs if spec.bits not in (4, 8) or not spec.symmetric]
    return f"fast (Marlin) kernels are for 4 and 8-bit symmetric weights; {_some(slow)} others" if slow else None


def fp8_kv_cache(stored: Stored) -> str | None:
    """Where a KV cache is asked for, it is one of symmetric 8-bit floats."""
    scheme = kv_scheme(stored.config)
    if scheme is None or is_fp8(scheme):
        return None
    return f"takes symmetric 8-bit floats for its KV cache, and the config asks for {in_words(scheme)}"


def kv_cache_by_option(stored: Stored) -> str | None:
    """A note: the scales wait for the user."""
    asks = kv_scheme(stored.config) is not None
    return "its KV cache is of the model's own type, and stored scales wait, until --kv-cache-dtype fp8_e4m3 is given" if asks else None


def kv_cache_ignored(stored: Stored) -> str | None:
    """A note: what is stored for the cache does nothing."""
    asks = kv_scheme(stored.config) is not None
    return "keeps its KV cache in the model's own type and calls the scales stored for it unexpected" if asks else None


def unread_here(stored: Stored) -> str | None:
    return stored.unread


def config_groups(stored: Stored) -> list[Mapping[str, Any]]:
    """The config groups of a compressed-tensors model, as far as they are any."""
    groups = stored.config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def bits(layer: StoredLayer) -> int:
    assert layer.scheme.weight is not None
    return layer.scheme.weight.bits


def _experts(stored: Stored) -> list[StoredLayer]:
    return [layer for layer in stored.layers if ".experts." in layer.name]


def _fused_names(schemes: Collection[str]) -> Iterable[list[str]]:
    experts: dict[str, list[str]] = {}
    for name in schemes:
        if ".experts." in name:
            experts.setdefault(name.partition(".experts.")[0], []).append(name)
    return [*fused_groups(schemes).values(), *experts.values()]


def _unlike(names: list[str], schemes: Mapping[str, str]) -> list[str]:
    """One name for each scheme."""
    return list({schemes[name]: name for name in reversed(names)}.values())[::-1]


def _listed(values: Iterable[Any]) -> str:
    words = ["per channel" if v == CHANNEL else str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _some(names: list[str]) -> str:
    return f"{names[0]} has" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more have"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
