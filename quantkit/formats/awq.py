"""The AWQ GEMM container of AutoAWQ: 4-bit codes and zero points packed along N in an interleaved order, half-precision scales [G, N].

Nibble i of a word is column ORDER[i] of its eight. Weights have zero points; layers are of one group size. The scales that AWQ finds for
channels are folded into the layers before, so nothing of them is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.core.packing import pack, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Infos, Read, assembled, require_parts, why_uneven
from quantkit.formats.config_keys import require_known, require_value

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE_OF = tuple(ORDER.index(column) for column in range(8))


class AWQ:
    name = "awq"
    holds_conv1d = False
    holds_mixed = False
    scale_dtypes = (torch.float16,)

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        spec = scheme.weight
        assert spec is not None
        if scheme.activation is not None or spec.kind != "int" or spec.scale != "float":
            return "awq holds 4-bit integers with 16-bit activations; use compressed-tensors"
        if spec.bits != 4 or spec.symmetric:
            return f"awq loaders read 4 bits with zero points, as in w4a16-asym, not {scheme.name}; use compressed-tensors"
        if shape[0] % 8:
            return f"its words take 8 output features each, and {shape[0]} is no multiple of 8"
        return why_uneven(spec, shape)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        if "qweight" not in infos:
            raise FormatError(f"it has {', '.join(sorted(infos)) or 'nothing'}")
        columns, words = infos["qweight"].shape
        return words * 8, columns

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        if q.group_of_column is not None:
            raise FormatError("awq holds no act-order permutation; quantize with static order")
        assert q.zero is not None
        return {
            "qweight": pack(_interleaved(q.codes.T), 4),
            "qzeros": pack(_interleaved(q.zero.T), 4),
            "scales": q.scale.T.contiguous(),
        }

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        spec = scheme.weight
        assert spec is not None
        require_parts(parts, self.part_names(scheme))
        codes, zero = (_straight(unpack(parts[name], 4, parts[name].shape[1] * 8)).T.contiguous() for name in ("qweight", "qzeros"))
        return assembled(spec, codes, parts["scales"].T.contiguous(), zero.to(torch.int16))

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        (scheme,) = set(layers.values())
        assert scheme.weight is not None
        return {
            "quant_method": "awq", "bits": 4, "group_size": scheme.weight.group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": sorted(ignored),
        }  # fmt: skip

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        require_known(config, "awq")
        for key, read in (("zero_point", (True,)), ("pack_dtype", ("int32", "torch.int32")), ("format", ("gemm",)), ("checkpoint_format", ("gemm",))):
            require_value(config, key, read, "awq")
        for key, alias in (("bits", "w_bit"), ("group_size", "q_group_size")):
            if key in config and config.get(alias) not in (None, config[key]):
                raise FormatError(f"AWQ {key} is {config[key]} and {alias} is {config[alias]}; one of them is wrong")
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
        if version != "gemm" or bits != 4:
            raise FormatError(f"AWQ of version {version!r} with {bits} bits is not read; quantkit reads gemm with 4 bits")
        group = config.get("group_size", config.get("q_group_size", 128))
        scheme = parse_scheme("w4a16-asym-channel" if group == CHANNEL else f"w4a16-asym-g{group}")
        return {name.removesuffix(".qweight"): scheme for name in names if name.endswith(".qweight")}


def _interleaved(values: Tensor) -> Tensor:
    """[R, N] with the columns of each eight in the order in which a word holds them."""
    return values.unflatten(1, (-1, 8))[..., ORDER].flatten(1)


def _straight(values: Tensor) -> Tensor:
    return values.unflatten(1, (-1, 8))[..., _PLACE_OF].flatten(1)
