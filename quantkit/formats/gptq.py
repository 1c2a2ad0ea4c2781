"""The GPTQ container: codes packed along K in columns of words, zero points along N, half-precision scales [G, N].

Layout after GPTQModel 7. `checkpoint_format: gptq` (v1) stores every zero point less one; `gptq_v2` stores it as it is. A zero point of 0 has
no v1 form that loaders agree on, so asymmetric weights are written as v2 and labelled so; symmetric ones as v1, which everybody loads.
Mixed schemes go into `dynamic`, an ordered map of regular expressions, some for layers that only an engine has (see `fusion`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import __version__
from quantkit.checkpoint.safetensors_header import TensorInfo
from quantkit.core.packing import pack, packed_words, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, UNQUANTIZED, QuantSpec, Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Infos, Read, assembled, require_parts, why_uneven
from quantkit.formats.config_keys import require_known, require_value
from quantkit.formats.fusion import fused_groups
from quantkit.formats.name_patterns import NamePatterns

_BITS = (2, 3, 4, 8)


def has_wrapped_zeros(qzeros: Tensor, bits: int, rows: int) -> bool:
    """Whether a v1 file stores a zero point that is all ones: 0 less one, as GPTQModel writes it, or one beyond the highest code. Loaders differ."""
    return bool((unpack(qzeros, bits, rows) == 2**bits - 1).any())


class GPTQ:
    holds_conv1d = True
    holds_mixed = True
    scale_dtypes = (torch.float16,)

    def __init__(self, zero_offset: int) -> None:
        """`zero_offset` is what a stored zero point lacks: 1 in v1, 0 in v2."""
        self.zero_offset = zero_offset
        self.name = "gptq" if zero_offset else "gptq-v2"

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        spec = scheme.weight
        assert spec is not None
        if spec.kind != "int" or spec.scale != "float":
            holder = "bitsandbytes" if spec.is_flat or spec.scale == "row maximum" else "compressed-tensors"
            return f"gptq holds integers, not {scheme.name}; use {holder}"
        if scheme.activation is not None:
            return "gptq stores no activation quantization; use compressed-tensors"
        if spec.bits not in _BITS:
            return f"gptq loaders read {', '.join(map(str, _BITS))} bits, not {spec.bits}; use compressed-tensors"
        if self.zero_offset == 1 and not spec.symmetric:
            return "a zero point of 0 has no v1 form; use gptq-v2"
        return why_uneven(spec, shape)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        if "qweight" not in infos or scheme.weight is None:
            raise FormatError(f"it has {', '.join(sorted(infos)) or 'nothing'}")
        words, rows = infos["qweight"].shape
        return rows, _columns(words, scheme.weight.bits, infos.get("g_idx"))

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        columns = q.shape[1]
        zero = torch.full_like(q.scale, q.spec.mid_code, dtype=torch.int16) if q.zero is None else q.zero.to(torch.int16)
        group_of_column = q.group_of_column
        if group_of_column is None:
            group_of_column = torch.arange(columns, dtype=torch.int32, device=q.codes.device) // q.spec.group_size(columns)
        stored = (zero - self.zero_offset) & q.spec.max_code
        return {
            "qweight": pack(q.codes, q.spec.bits).T.contiguous(),
            "qzeros": pack(stored.T.contiguous(), q.spec.bits),
            "scales": q.scale.T.contiguous(),
            "g_idx": group_of_column.to(torch.int32),
        }

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        spec = scheme.weight
        assert spec is not None
        require_parts(parts, ("qweight", "qzeros", "scales"))
        scale = parts["scales"].T.contiguous()
        rows = scale.shape[0]
        columns = _columns(parts["qweight"].shape[0], spec.bits, parts.get("g_idx"))
        shape, needed = list(parts["qweight"].shape), [packed_words(columns, spec.bits), rows]
        if shape != needed:
            raise FormatError(f"qweight is {shape}; {rows} x {columns} codes of {spec.bits} bits need {needed}")
        zero = (unpack(parts["qzeros"], spec.bits, rows).T.to(torch.int16) + self.zero_offset).contiguous()
        if spec.symmetric:
            self._require_middle(zero, spec)
        codes = unpack(parts["qweight"].T.contiguous(), spec.bits, columns)
        return assembled(spec, codes, scale, None if spec.symmetric else zero, _shuffled(parts.get("g_idx"), spec, columns))

    def _require_middle(self, zero: Tensor, spec: QuantSpec) -> None:
        """Raises FormatError where a layer that is said to be symmetric is not: some engines then go by the label, others by the zero points."""
        if bool((zero != spec.mid_code).any()):
            stored, wanted = int(zero[zero != spec.mid_code][0]) - self.zero_offset, spec.mid_code - self.zero_offset
            raise FormatError(f"sym is true, so {self.name} stores the zero point {wanted}, and here is {stored}; checkpoint_format or sym is wrong")

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        main = Counter(layers.values()).most_common(1)[0][0]
        assert main.weight is not None
        schemes = _with_fused({name: UNQUANTIZED for name in ignored if name != "lm_head"} | dict(layers))
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name, scheme in schemes.items() if not scheme.is_quantized}
        for name, scheme in schemes.items():
            if scheme.is_quantized and scheme != main:
                dynamic[f"+:^{re.escape(name)}$"] = _spec_config(scheme)
        label = "gptq" if self.zero_offset else "gptq_v2"
        config = {
            "quant_method": "gptq", **_spec_config(main), "desc_act": False, "static_groups": False, "true_sequential": False,
            "lm_head": "lm_head" in layers, "checkpoint_format": label, "format": label, "pack_dtype": "int32",
            "meta": {"quantizer": [f"quantkit:{__version__}"]},
            "damp_percent": 0.01,  # says nothing of how the codes were made: transformers refuses a config without a value between 0 and 1
        }  # fmt: skip
        return config | ({"dynamic": dynamic} if dynamic else {})

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        require_known(config, "gptq")
        require_value(config, "pack_dtype", ("int32", "torch.int32"), "gptq")
        require_value(config, "is_marlin_format", (False,), "gptq")
        modules, ordered = ([name.removesuffix(part) for name in names if name.endswith(part)] for part in (".qweight", ".g_idx"))
        dynamic = config.get("dynamic") or {}
        for entry, override in dynamic.items():
            if not entry.startswith("-:"):
                require_known(override, "gptq dynamic")
                require_value(override, "pack_dtype", ("int32", "torch.int32"), f"gptq dynamic {entry!r}")
        patterns = NamePatterns({entry: entry.removeprefix("+:") for entry in dynamic if not entry.startswith("-:")})
        schemes = {module: _scheme_of(config, dynamic.get(patterns.first(module), {})) for module in modules}
        in_groups = [name for name, scheme in schemes.items() if scheme.weight is not None and scheme.weight.group != CHANNEL]
        unordered = sorted(set(in_groups).difference(ordered))
        if config.get("desc_act") and unordered:
            raise FormatError(f"desc_act is true, and {unordered[0]} has no g_idx that tells the order of its columns; fetch the checkpoint again")
        return schemes


def labelled(config: Mapping[str, Any]) -> GPTQ:
    """The GPTQ format whose zero points are those of a checkpoint with this quantization_config.

    Raises:
        FormatError: its codes or zero points are laid out in a third way.
    """
    label, other = config.get("checkpoint_format") or config.get("format") or "gptq", config.get("format")
    if other not in (None, "", label):
        raise FormatError(f"GPTQ checkpoint_format is {label!r} and format is {other!r}; which of them is right decides what zero points mean")
    if label not in ("gptq", "gptq_v2"):
        raise FormatError(f"GPTQ checkpoint_format {label!r} is not read yet; quantkit reads gptq and gptq_v2")
    return GPTQ(zero_offset=0 if label == "gptq_v2" else 1)


def _with_fused(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Sorted, and with the joint names of layers that vLLM joins: it looks up those alone."""
    joint = {name: {schemes[member] for member in members} for name, members in fused_groups(schemes).items()}
    return dict(sorted((schemes | {name: found.pop() for name, found in joint.items() if len(found) == 1}).items()))


def _spec_config(scheme: Scheme) -> dict[str, Any]:
    spec = scheme.weight
    assert spec is not None
    return {"bits": spec.bits, "group_size": spec.group, "sym": spec.symmetric}


def _scheme_of(config: Mapping[str, Any], override: Mapping[str, Any]) -> Scheme:
    values = {"bits": config["bits"], "group_size": config.get("group_size", 128), "sym": config.get("sym", True)}
    values |= {k: v for k, v in override.items() if k in values}
    suffix = "-channel" if values["group_size"] == -1 else f"-g{values['group_size']}"
    return parse_scheme(f"w{values['bits']}a16{'' if values['sym'] else '-asym'}{suffix}")


def _columns(words: int, bits: int, g_idx: Tensor | TensorInfo | None) -> int:
    """Columns in that many words: as g_idx has them where they need as many, else all that fit."""
    named = g_idx.shape[0] if g_idx is not None and len(g_idx.shape) == 1 else 0
    return named if packed_words(named, bits) == words else words * 32 // bits


def _shuffled(g_idx: Tensor | None, spec: QuantSpec, columns: int) -> Tensor | None:
    """g_idx where its groups are not runs of columns; None where it says nothing new."""
    if g_idx is None:
        return None
    plain = torch.arange(columns, dtype=g_idx.dtype, device=g_idx.device) // spec.group_size(columns)
    return None if torch.equal(g_idx, plain) else g_idx
