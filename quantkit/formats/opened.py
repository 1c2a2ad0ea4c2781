"""A checkpoint of any container seen as dense weights: quantized layers are decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.source import Source
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError, QuantkitError, RecipeError
from quantkit.formats.base import Format
from quantkit.formats.registry import format_of
from quantkit.models.names import is_kv_scale

_TYPES_OF_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_ZERO_POINTS = ("weight_zero_point", "input_zero_point")
"""Which some tools write for symmetric layers too, as zeros."""


class OpenedCheckpoint:
    """Reads headers only until a tensor is asked for.

    Attributes:
        format: the container of its quantized layers, or None when there are none.
        schemes: how each quantized module is stored, by the module's name.

    Raises:
        SourceError, CheckpointError: as CheckpointReader.
        FormatError: it is quantized in a container, or in a way, that is not read.
    """

    def __init__(self, folder: Path) -> None:
        self.reader = CheckpointReader(folder)
        self.format: Format | None = None
        self.schemes: dict[str, Scheme] = {}
        if config := self.reader.quantization_config:
            try:
                self.format = format_of(config)
                self.schemes = self.format.read_config(config, self.reader.names, self.reader.get)
            except (RecipeError, KeyError, TypeError, AttributeError, ValueError) as error:  # another tool's configuration may lack, or be, anything
                raise FormatError(f"its quantization_config is not understood ({type(error).__name__}: {error})") from error
        parts = {f"{module}.{part}" for module, scheme in self.schemes.items() for part in self.format.part_names(scheme)} if self.format else set()
        self.dense_names = [name for name in self.reader.names if name not in parts]
        self._require_understood()
        self._known = {*self.dense_names, *(f"{module}.weight" for module in self.schemes)}

    def _require_understood(self) -> None:
        """Raises FormatError for a tensor beside a quantized layer that its scheme does not know, and for codes whose scales are absent."""
        for name in self.dense_names:
            part = name.rpartition(".")[2]
            owner = next((stem for stem in stems(name) if stem in self.schemes), None)
            is_known = part == "bias" or is_kv_scale(name) or (part in _ZERO_POINTS and not bool(self.reader.get(name).any()))
            if owner is not None and not is_known:
                raise FormatError(f"{name} belongs to no {self.schemes[owner].name} layer as quantkit reads it; it may change what the weights mean")
            if part == "weight" and (kind := self.reader.info(name).dtype) in _TYPES_OF_CODES:
                scales = "no scales beside it" if self.format else "no quantization_config says what its codes mean"
                raise FormatError(f"{name} is stored as {str(kind).removeprefix('torch.')}, and {scales}; fetch the checkpoint again")

    @classmethod
    def of(cls, source: Source) -> OpenedCheckpoint:
        """A source's checkpoint; errors name the source as the user did."""
        try:
            return cls(source.folder)
        except QuantkitError as error:
            raise error if source.name in str(error) else type(error)(f"{source.name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def names(self) -> list[str]:
        """Dense names: every tensor that is stored as it is, and `module.weight` of every quantized module."""
        return [*self.dense_names, *(f"{module}.weight" for module in self.schemes)]

    def get(self, name: str) -> Tensor:
        """A dense tensor: as stored, or decoded to float32 [N, K]."""
        module = name.removesuffix(".weight")
        if module in self.schemes and name.endswith(".weight"):
            return self.quantized(module).dequantize()
        return self.reader.get(name)

    def parts(self, module: str) -> list[str]:
        """The stored names of a quantized module's tensors."""
        assert self.format is not None
        return [name for part in self.format.part_names(self.schemes[module]) if (name := f"{module}.{part}") in self.reader]

    def quantized(self, module: str) -> QuantizedTensor:
        assert self.format is not None
        stored = {name.removeprefix(f"{module}."): self.reader.get(name) for name in self.parts(module)}
        try:
            return self.format.decode(stored, self.schemes[module])
        except FormatError as error:
            raise FormatError(f"{module} cannot be decoded: {error}") from error

    def static_scales(self) -> dict[str, Tensor]:
        """The calibrated scale [1] of every quantized module's input that has one."""
        found = {}
        for module, scheme in self.schemes.items():
            if scheme.is_static:
                if f"{module}.input_scale" not in self.reader:
                    raise FormatError(f"{module} is of {scheme.name} and has no input_scale")
                found[module] = self.reader.get(f"{module}.input_scale").reshape(1)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of its unquantized values."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.dense_names:
            info = self.reader.info(name)
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32


def stems(name: str) -> list[str]:
    """Everything a dotted name may belong to, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
