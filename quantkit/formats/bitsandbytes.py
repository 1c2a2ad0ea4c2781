"""The bitsandbytes container: 4-bit tables (NF4, FP4) packed in the order of memory, and LLM.int8 rows, as bitsandbytes 0.50 serializes them.

A 4-bit layer keeps beside its weight the largest magnitude of every block (or 8-bit codes of these and what they stand for), the table, and a JSON
text of what it is, in bytes. A weight's first value lies in the high half of its byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.levels import table
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scales import NESTED_BLOCK, NestedScales
from quantkit.core.scheme import FLAT_BLOCKS, Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Infos, Read, require_parts
from quantkit.formats.config_keys import require_known, require_value

_STATE = "weight.quant_state.bitsandbytes__"
_OFFSET_ROOM = 24
"""Characters of the longest float in JSON: the text is filled up to them, so that its length does not depend on values."""


class BitsAndBytes:
    name = "bitsandbytes"
    holds_conv1d = False
    holds_mixed = False
    scale_dtypes = (torch.float32,)

    def __init__(self, model_dtype: torch.dtype = torch.bfloat16) -> None:
        """`model_dtype` is what weights are said to dequantize to."""
        self.model_dtype = model_dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitsAndBytes) and other.model_dtype == self.model_dtype

    def __hash__(self) -> int:
        return hash((type(self), self.model_dtype))

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        spec = scheme.weight
        assert spec is not None
        if not spec.is_flat and spec.scale != "row maximum":
            return f"bitsandbytes holds nf4, fp4 and int8, not {scheme.name}; use compressed-tensors"
        return None

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        spec = scheme.weight
        assert spec is not None
        if spec.scale == "row maximum":
            return ("weight", "SCB", "weight_format")
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if spec.scale == "nested" else ()
        return ("weight", "weight.absmax", "weight.quant_map", f"{_STATE}{spec.kind}", *nested)

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        spec = scheme.weight
        assert spec is not None
        if spec.scale == "row maximum" and "weight" in infos:
            rows, columns = infos["weight"].shape
        elif f"{_STATE}{spec.kind}" in infos:
            rows, columns = _state(read(f"{_STATE}{spec.kind}"))["shape"]
        else:
            raise FormatError(f"it has {', '.join(sorted(infos)) or 'nothing'}")
        return rows, columns

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        if q.spec.scale == "row maximum":
            weight = (q.codes.to(torch.int16) - q.spec.mid_code).to(torch.int8)
            return {"weight": weight, "SCB": q.scale.flatten(), "weight_format": torch.zeros((), dtype=torch.uint8)}
        codes = torch.nn.functional.pad(q.codes.flatten(), (0, q.codes.numel() % 2))
        levels = table(q.spec.kind)
        assert levels is not None
        parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.absmax": q.scale, "weight.quant_map": levels.clone()}
        if q.nested is not None:
            parts |= {"weight.nested_absmax": q.nested.outer, "weight.nested_quant_map": q.nested.table}
        return parts | {f"{_STATE}{q.spec.kind}": self._state_bytes(q)}

    def _state_bytes(self, q: QuantizedTensor) -> Tensor:
        state: dict[str, Any] = {
            "quant_type": q.spec.kind, "blocksize": q.spec.group, "dtype": str(self.model_dtype).removeprefix("torch."), "shape": list(q.shape),
        }  # fmt: skip
        length = None
        if q.nested is not None:
            offset = 0.0 if q.nested.offset.device.type == "meta" else q.nested.offset.item()
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            length = len(json.dumps(state | {"nested_offset": 0.0})) + _OFFSET_ROOM - len("0.0")
        text = json.dumps(state)
        return torch.frombuffer(bytearray(text.ljust(length or len(text)).encode()), dtype=torch.uint8)

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        spec = scheme.weight
        assert spec is not None
        require_parts(parts, [name for name in self.part_names(scheme) if name != "weight_format"])
        if spec.scale == "row maximum":
            if int(parts.get("weight_format", torch.zeros(())).item()) != 0:
                raise FormatError(f"weight_format is {int(parts['weight_format'])}; quantkit reads 0, plain rows")
            codes = (parts["weight"].to(torch.int16) + spec.mid_code).to(torch.uint8)
            return QuantizedTensor(spec, codes, parts["SCB"].reshape(-1, 1))
        state = _state(parts[f"{_STATE}{spec.kind}"])
        if not torch.equal(parts["weight.quant_map"], _levels(spec.kind)):
            raise FormatError(f"its quant_map is not that of {spec.kind}; quantkit reads bitsandbytes' own tables")
        rows, columns = state["shape"]
        packed = parts["weight"].view(torch.uint8).flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[: rows * columns].view(rows, columns)
        scale, wanted = parts["weight.absmax"], spec.scale_shape(rows, columns)
        if tuple(scale.shape) != wanted:
            raise FormatError(f"absmax has {list(scale.shape)}; {rows} x {columns} codes in blocks of {spec.group} have {list(wanted)}")
        nested = None
        if spec.scale == "nested":
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            nested = NestedScales(parts["weight.nested_absmax"], offset, parts["weight.nested_quant_map"])
        return QuantizedTensor(spec, codes, scale, nested=nested)

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        (scheme,) = set(layers.values())
        spec = scheme.weight
        assert spec is not None
        is_int8 = spec.scale == "row maximum"
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": not is_int8, "load_in_8bit": is_int8, "_load_in_4bit": not is_int8,
            "_load_in_8bit": is_int8, "bnb_4bit_quant_type": "nf4" if is_int8 else spec.kind, "bnb_4bit_use_double_quant": spec.scale == "nested",
            "bnb_4bit_compute_dtype": str(self.model_dtype).removeprefix("torch."), "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": sorted(ignored), "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        }  # fmt: skip

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        require_known(config, "bitsandbytes")
        if config.get("load_in_8bit"):
            threshold = config.get("llm_int8_threshold", 6.0)
            if threshold != 6.0:
                raise FormatError(f"bitsandbytes with llm_int8_threshold {threshold} is not read yet; quantkit reads 6.0")
            return {name.removesuffix(".SCB"): parse_scheme("int8") for name in names if name.endswith(".SCB")}
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        if storage != "uint8":
            raise FormatError(f"bitsandbytes with bnb_4bit_quant_storage {storage!r} is not read yet; quantkit reads uint8")
        schemes = {}
        for name in names:
            module, is_state, kind = name.partition(f".{_STATE}")
            if is_state:
                schemes[module] = _scheme(kind, _state(read(name)))
        return schemes


def _scheme(kind: str, state: Mapping[str, Any]) -> Scheme:
    require_value(state, "quant_type", (kind,), f"a quant_state of {kind}")
    block, nested_block = state["blocksize"], state.get("nested_blocksize")
    if block not in FLAT_BLOCKS or nested_block not in (None, NESTED_BLOCK):
        blocks = ", ".join(map(str, FLAT_BLOCKS))
        raise FormatError(f"its blocksize is {block}, its nested_blocksize {nested_block}; quantkit reads {blocks} and {NESTED_BLOCK}")
    return parse_scheme(f"{kind}-b{block}{'' if nested_block is None else '-dq'}")


def _levels(kind: Any) -> Tensor:
    levels = table(kind)
    assert levels is not None
    return levels


def _state(stored: Tensor) -> dict[str, Any]:
    """The JSON text that a 4-bit layer keeps of itself.

    Raises:
        FormatError: it is none, or lacks what is needed.
    """
    try:
        state = json.loads(bytes(stored.tolist()).decode("utf-8"))
        _ = state["shape"], state["blocksize"], state["nested_offset"] if "nested_blocksize" in state else None
        require_known(state, "bitsandbytes quant_state")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"its quant_state is damaged ({type(error).__name__}: {error})") from error
    return state
