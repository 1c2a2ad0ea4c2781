"""A checkpoint of any container made ready to be streamed block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.formats.kv_scales import read_kv_scales, rounded_states
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.compare import StreamedModel


class FileOrder:
    """A checkpoint's dense weights in the order in which an unquantized file keeps them: decoded Conv1D weights turned back to [K, N].

    A square one could not be told by its shape.
    """

    def __init__(self, opened: OpenedCheckpoint, architecture: Architecture) -> None:
        self.opened = opened
        self._turned = {f"{name}.weight" for name in transposed_layers(architecture) if name in opened.schemes}

    def __contains__(self, name: object) -> bool:
        return name in self.opened

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of the quantized layers, by name."""
        return self.opened.schemes

    def quantized(self, module: str) -> QuantizedTensor:
        """A quantized layer as it is stored, [N, K]."""
        return self.opened.quantized(module)

    def get(self, name: str) -> Tensor:
        value = self.opened.get(name)
        return value.T.contiguous() if name in self._turned else value


def transposed_layers(architecture: Architecture) -> set[str]:
    """Linears that an unquantized file keeps as [K, N], by checkpoint name."""
    linears = [linear for block in architecture.blocks for linear in block.linears] + architecture.outside
    return {linear.name for linear in linears if linear.is_transposed}


def streamed(opened: OpenedCheckpoint, architecture: Architecture, label: str) -> StreamedModel:
    """With inputs and the KV cache rounded as the checkpoint asks for; a cache without stored scales, or of a kind that is not read, is not."""
    kv = read_kv_scales(opened, architecture)
    cached = partial(rounded_states, kv.layers) if kv.is_wanted and kv.layers and kv.refusal is None else None
    return StreamedModel(architecture, FileOrder(opened, architecture), opened.schemes, label, opened.static_scales(), cached)


def open_streamed(folder: Path, label: str, *, trust_remote_code: bool = False) -> StreamedModel:
    """Reads headers and builds the model without weights; raises what OpenedCheckpoint, `load_config` and `describe` raise."""
    opened = OpenedCheckpoint(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return streamed(opened, describe(config, opened, trust_remote_code=trust_remote_code), label)
