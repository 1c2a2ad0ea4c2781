"""The "fp8" container: 8-bit floats (E4M3) with one float32 scale a tensor, or a block of 128 x 128 as DeepSeek's checkpoints have them.

A block's scale is named `weight_scale_inv` and is what weights are multiplied by, all the same. Every layer is of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import FP8_BLOCK, parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Infos, Read, assembled, require_parts, why_uneven
from quantkit.formats.config_keys import require_known, require_value

_HELD = ("fp8-block", "fp8-tensor", "fp8-static")


class FP8:
    name = "fp8"
    holds_conv1d = False
    holds_mixed = False
    scale_dtypes = (torch.float32,)

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.name not in _HELD:
            return f"fp8 holds {', '.join(_HELD)}; use compressed-tensors"
        assert scheme.weight is not None
        return why_uneven(scheme.weight, shape)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight", _scale_name(scheme), "input_scale")

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        if "weight" not in infos:
            raise FormatError(f"it has {', '.join(sorted(infos)) or 'nothing'}")
        rows, columns = infos["weight"].shape
        return rows, columns

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        weight = q.codes.view(torch.float8_e4m3fn)
        scale = q.scale if scheme.name == "fp8-block" else q.scale.reshape(1)
        parts = {"weight": weight, _scale_name(scheme): scale}
        return parts | ({} if q.input_scale is None else {"input_scale": q.input_scale})

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        spec = scheme.weight
        assert spec is not None
        require_parts(parts, ("weight", _scale_name(scheme), *(("input_scale",) if scheme.is_static else ())))
        scale = parts[_scale_name(scheme)]
        q = assembled(spec, parts["weight"].view(torch.uint8), scale if spec.group is not None else scale.reshape(1, 1))
        q.input_scale = parts["input_scale"].reshape(1) if scheme.is_static else None
        return q

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        (scheme,) = set(layers.values())
        static = scheme.name == "fp8-static"
        blocks = {"weight_block_size": list(FP8_BLOCK)} if scheme.name == "fp8-block" else {}
        return {
            "quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "fmt": "e4m3", **blocks,
            "modules_to_not_convert": sorted(ignored),
        }  # fmt: skip

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        require_known(config, "fp8")
        require_value(config, "expert_dtype", ("fp8",), "fp8")
        block, activations = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
        for key, wanted in (("fmt", "e4m3"), ("scale_fmt", "float")):
            if config.get(key) not in (None, wanted):
                raise FormatError(f"fp8 with {key} {config[key]!r} is not read yet; quantkit reads {wanted}")
        if block is not None and (tuple(block) != FP8_BLOCK or activations != "dynamic"):
            raise FormatError(f"fp8 with blocks of {block} and {activations} activations is not read; quantkit reads 128 x 128 with dynamic ones")
        if activations not in ("dynamic", "static"):
            raise FormatError(f"fp8 with activation_scheme {activations!r} is not read; quantkit reads dynamic and static")
        scheme = parse_scheme("fp8-block" if block else "fp8-static" if activations == "static" else "fp8-tensor")
        modules = [name.rpartition(".") for name in names]
        return {module: scheme for module, _, part in modules if part in ("weight_scale_inv", "weight_scale")}


def _scale_name(scheme: Scheme) -> str:
    return "weight_scale_inv" if scheme.name == "fp8-block" else "weight_scale"
