"""No container at all: ordinary weights, as `--format bf16` writes them. It holds nothing that is quantized and has no configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError
from quantkit.formats.base import Infos, Read


class Plain:
    name = "bf16"
    holds_conv1d = True
    holds_mixed = True
    scale_dtypes = ()

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return "it writes ordinary weights; take a container, such as compressed-tensors"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def part_names(self, scheme: Scheme) -> tuple[str, ...]:
        return ()

    def encode(self, q: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
        self._refuse()

    def decode(self, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        self._refuse()

    def stored_shape(self, infos: Infos, scheme: Scheme, read: Read) -> tuple[int, int]:
        self._refuse()

    def config(self, layers: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        return {}

    def read_config(self, config: Mapping[str, Any], names: Iterable[str], read: Read) -> dict[str, Scheme]:
        return {}

    def _refuse(self) -> NoReturn:
        raise FormatError("bf16 holds no quantized layers")
