"""The compressed-tensors container, layout after compressed-tensors 0.20: integers packed into words or as int8, FP8, NVFP4 and the MX types.

Every config group may have a layout of its own ("mixed-precision"). See `ct_layouts` for the tensors and `ct_schemes` for the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError
from quantkit.formats import ct_layouts
from quantkit.formats.base import Infos, Read, why_uneven
from quantkit.formats.ct_schemes import ConfigGroups, group_config, layout_of, require_no_more, scheme_of

VERSION = "0.20.0"


class CompressedTensors:
    name = "compressed-tensors"
    holds_conv1d = False
    holds_mixed = True
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        spec = scheme.weight
        assert spec is not None
        if spec.is_flat or spec.scale == "row maximum":
            return f"{scheme.name} is stored as bitsandbytes has it; use bitsandbytes"
        return why_uneven(spec, shape)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit type; half for a float32 model, whose scales would otherwise cost twice."""
        return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        return ct_layouts.PART_NAMES[layout_of(scheme)]

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        if "weight_shape" in infos:
            rows, columns = (int(n) for n in read("weight_shape"))
            return rows, columns
        if "weight" in infos:
            rows, columns = infos["weight"].shape
            return rows, columns
        if "weight_packed" in infos and scheme.weight is not None and scheme.weight.kind == "e2m1":
            rows, half = infos["weight_packed"].shape
            return rows, half * 2
        raise FormatError(f"it has {', '.join(sorted(infos)) or 'nothing'}")

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        if q.group_of_column is not None:
            raise FormatError("compressed-tensors holds no act-order permutation; quantize with static order")
        return ct_layouts.encode(q, layout_of(scheme))

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        return ct_layouts.decode(parts, scheme, layout_of(scheme))

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in layers.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        for i, (scheme, names) in enumerate(by_scheme.items()):
            targets = ["Linear"] if len(by_scheme) == 1 else sorted(names)
            groups[f"group_{i}"] = group_config(scheme, targets)
        layouts = sorted({g["format"] for g in groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "format": layouts[0] if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
            "quantization_status": "compressed",
            "version": VERSION,
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": sorted(ignored),
            "config_groups": groups,
        }

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        require_no_more(config)
        group_of = ConfigGroups(list((config.get("config_groups") or {}).values()))
        schemes: dict[str, Scheme] = {}
        for name in names:
            module, _, part = name.rpartition(".")
            if part == "weight_packed" or (part == "weight_scale" and module not in schemes):
                schemes[module] = scheme_of(group_of[module], config)
        return schemes
