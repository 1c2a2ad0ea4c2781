"""The compressed-tensors container: pack-quantized (integers of any width in 32-bit words) and int-quantized (int8 with int8 activations).

Layout after compressed-tensors 0.20. Codes are stored unsigned, packed along K; zero points, unsigned too, along N; scales [N, G] in the
model's type. Files written before mid-2026 keep 32 // bits codes a word at 3, 5 and 6 bits: their width tells, and they are read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.packing import pack, packed_words, unpack, unpack_whole
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, ActivationSpec, QuantSpec, Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import assembled
from quantkit.formats.name_patterns import NamePatterns

VERSION = "0.20.0"
_PACKED, _INT = "pack-quantized", "int-quantized"
_IN_THE_WEIGHTS = {"weight_input", "weight_output"}
"""Places of a transform_config that leave nothing to do at run time."""


class CompressedTensors:
    name = "compressed-tensors"
    holds_conv1d = False

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        spec = scheme.weight
        assert spec is not None
        if scheme.activation is not None and (spec.bits, spec.group, spec.symmetric) != (8, CHANNEL, True):
            return "int8 activations are stored with symmetric 8-bit weights per channel only"
        if spec.group not in (None, CHANNEL) and shape[1] % spec.group:
            return f"groups of {spec.group} do not divide {shape[1]} input features"
        return None

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit type; half for a float32 model, whose scales would otherwise cost twice."""
        return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        if _layout(scheme) == _INT:
            return ("weight", "weight_scale", "input_scale")
        return ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        if q.group_of_column is not None:
            raise FormatError("compressed-tensors holds no act-order permutation; quantize with static order")
        if _layout(scheme) == _INT:
            return {"weight": (q.codes.to(torch.int16) - q.spec.mid_code).to(torch.int8), "weight_scale": q.scale}
        parts = {
            "weight_packed": pack(q.codes, q.spec.bits),
            "weight_scale": q.scale,
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero is not None:
            parts["weight_zero_point"] = pack(q.zero.T, q.spec.bits).T.contiguous()
        return parts

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        spec = scheme.weight
        assert spec is not None
        scale = _part(parts, "weight_scale")
        if _layout(scheme) == _INT:
            codes = (_part(parts, "weight").to(torch.int16) + spec.mid_code).to(torch.uint8)
            return assembled(spec, codes, _as_rows(scale, codes.shape[0]))
        rows, columns = (int(n) for n in _part(parts, "weight_shape"))
        words = _part(parts, "weight_packed")
        dense = words.shape[1] == packed_words(columns, spec.bits)
        if not dense and words.shape[1] != -(-columns // (32 // spec.bits)):
            needed = packed_words(columns, spec.bits)
            raise FormatError(f"weight_packed has {words.shape[1]} words a row; {columns} codes of {spec.bits} bits need {needed}")
        read = unpack if dense else unpack_whole
        zero = None
        if not spec.symmetric:
            zero = read(_part(parts, "weight_zero_point").T.contiguous(), spec.bits, rows).T.contiguous().to(torch.int16)
        group_of_column = parts.get("weight_g_idx")
        return assembled(spec, read(words, spec.bits, columns), _as_rows(scale, rows), zero, group_of_column)

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in layers.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        for i, (scheme, names) in enumerate(by_scheme.items()):
            targets = ["Linear"] if len(by_scheme) == 1 else sorted(names)
            groups[f"group_{i}"] = _group_config(scheme, targets)
        layouts = sorted({g["format"] for g in groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": VERSION,
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": sorted(ignored),
            "config_groups": groups,
        }

    def read_config(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        _require_no_more(config)
        group_of = _Groups(list((config.get("config_groups") or {}).values()))
        schemes: dict[str, Scheme] = {}
        for name in names:
            module, _, part = name.rpartition(".")
            if part == "weight_packed" or (part == "weight_scale" and module not in schemes):
                schemes[module] = _scheme_of(group_of[module], config)
        return schemes


def _layout(scheme: Scheme) -> str:
    return _INT if scheme.activation is not None else _PACKED


def _group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    spec = scheme.weight
    assert spec is not None
    weights: dict[str, Any] = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if spec.group == CHANNEL else {"strategy": "group", "group_size": spec.group}
    activations = None
    if scheme.activation is not None:
        activations = {"num_bits": scheme.activation.bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": targets, "format": _layout(scheme), "weights": weights, "input_activations": activations, "output_activations": None}


class _Groups:
    """The config group of a module: by its exact name, else by a regex, else by class."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._only = groups[0] if len(groups) == 1 else None
        self._by_target = {target: group for group in reversed(groups) for target in group.get("targets", ())}
        targets = [target for group in groups for target in group.get("targets", ())]
        self._patterns = NamePatterns({target: target[3:] for target in targets if target.startswith("re:")})

    def __getitem__(self, module: str) -> dict[str, Any]:
        if self._only is not None:
            return self._only
        target = module if module in self._by_target else self._patterns.first(module) or "Linear"
        if target not in self._by_target:
            raise FormatError(f"quantization_config has no group for the quantized layer {module}")
        return self._by_target[target]


def _scheme_of(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    layout = group.get("format") or config.get("format")
    weights = group["weights"]
    if weights.get("type") != "int" or layout not in (_PACKED, _INT):
        kind = weights.get("type")
        raise FormatError(f"compressed-tensors layout {layout!r} with {kind} weights is not read yet; quantkit reads {_PACKED} and {_INT}")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise FormatError(f"compressed-tensors strategy {strategy!r} is not read yet; quantkit reads group and channel")
    if group.get("output_activations") is not None:
        raise FormatError("compressed-tensors with output_activations is not read yet; quantkit reads layers whose outputs are not quantized")
    activations = group.get("input_activations")
    if layout == _INT:
        _require_w8a8(weights, activations, strategy)
        return Scheme("w8a8-int8", QuantSpec(8, CHANNEL), ActivationSpec())
    if activations is not None:
        kind = f"{activations.get('num_bits')}-bit {activations.get('type')}"
        raise FormatError(f"compressed-tensors {_PACKED} weights with {kind} activations are not read yet; quantkit reads them without")
    suffix = "-channel" if strategy == "channel" else f"-g{weights['group_size']}"
    return parse_scheme(f"w{weights['num_bits']}a16{'' if weights.get('symmetric', True) else '-asym'}{suffix}")


def _require_no_more(config: Mapping[str, Any]) -> None:
    """Raises FormatError for what changes layers beside their schemes. Transforms of weights are in the stored weights already."""
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    online = {str(part.get("location")) for group in groups.values() for part in group.get("apply", ())} - _IN_THE_WEIGHTS
    if online:
        raise FormatError(f"compressed-tensors with transforms at run time ({', '.join(sorted(online))}) is not read yet; convert the original model")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise FormatError(f"compressed-tensors with the sparsity_config {sparsity!r} is not read yet; quantkit reads dense")


def _require_w8a8(weights: Mapping[str, Any], activations: Mapping[str, Any] | None, strategy: str) -> None:
    """Raises FormatError for the int-quantized layers that are something else: their tensors would be read with another meaning."""
    read = "quantkit reads 8-bit symmetric weights per channel with 8-bit symmetric dynamic activations per token"
    if weights.get("num_bits") != 8 or not weights.get("symmetric", True) or strategy != "channel":
        kind = f"{weights.get('num_bits')}-bit {'symmetric' if weights.get('symmetric', True) else 'asymmetric'} weights per {strategy}"
        raise FormatError(f"compressed-tensors {_INT} with {kind} is not read yet; {read}")
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if activations is None or any(activations.get(name, value) != value for name, value in wanted.items()):
        given = "no activations quantized" if activations is None else ", ".join(f"{name} {activations.get(name)}" for name in wanted)
        raise FormatError(f"compressed-tensors {_INT} with {given} is not read yet; {read}")


def _part(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise FormatError(f"the layer has no {name}; it has {', '.join(sorted(parts)) or 'nothing'}")
    return parts[name]


def _as_rows(scale: Tensor, rows: int) -> Tensor:
    return scale if scale.ndim == 2 else scale.reshape(rows, -1)
